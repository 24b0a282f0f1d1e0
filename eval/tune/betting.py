# SPDX-License-Identifier: Apache-2.0
"""Confidence bounds on retained accuracy that hold at every moment of looking; knows neither models nor tasks.

The bounds are those of diversified betting (dKelly) in I. Waudby-Smith and A. Ramdas, "Estimating means of bounded
random variables by betting", JRSS B 86 (2024), arXiv:2010.09686. A gambler starts with 1 and bets, unit by
unit, that ``pruned - retain * unpruned`` is positive. If its mean is not, the wealth is a non-negative supermartingale,
so by Ville's inequality it ever reaches ``1 / alpha`` with a probability of at most ``alpha``: however often one looks,
and whatever makes one stop. The money is spread over fixed bets, so nothing is tuned and nothing taken for normal; a
unit counts with the whole of what it says, so that the order of a set of units changes no final wealth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

BETS = 0.5 ** np.arange(5)
"""Shares of the largest bet that cannot lose more than everything; the gambler begins with equal parts in each."""
TOP = 4.0
"""Where the search for the ends stops: a reducer that makes a model this many times as accurate does not exist."""
_STEPS = 30  # halvings of the search


class Bounds(NamedTuple):
    """Ends of an interval for the retained accuracy, each with an error probability of its own."""

    low: float
    high: float


def log_wealth(gains: np.ndarray) -> np.ndarray:
    """Logarithm of the wealth after each unit of someone who bets that the mean is positive.

    Parameters
    ----------
    gains : ndarray
        (n,) of at least -1.
    """
    return np.logaddexp.reduce(np.cumsum(_each(gains), axis=1), axis=0) - math.log(len(BETS))


def projected(gains: np.ndarray, further: int, luck: float = 0.0) -> float:
    """`log_wealth` after so many further units if they are like those so far, and each better by ``luck``."""
    found = _each(gains).sum(1) + further * _each(gains + luck).mean(1)
    return float(np.logaddexp.reduce(found)) - math.log(len(BETS))


def further_units(gains: np.ndarray, alpha: float) -> int | None:
    """After how many units like those so far the wealth reaches ``1 / alpha``; None if it does not grow."""
    found = _each(gains)
    missing, speed = math.log(len(BETS) / alpha) - found.sum(1), found.mean(1)
    growing = speed > 0
    return math.ceil(max((missing[growing] / speed[growing]).min(), 0)) if growing.any() else None


def _each(gains: np.ndarray) -> np.ndarray:
    """(bets, n) what each bet adds to the logarithm of its own wealth."""
    with np.errstate(divide="ignore"):  # a bet of everything can be lost, and then stays at nothing
        return np.log1p(np.multiply.outer(BETS, gains))


def gains_of(pruned: np.ndarray, unpruned: np.ndarray, retain: float) -> np.ndarray:
    """What each unit says for "more than ``retain`` of the accuracy is retained", -1 at worst.

    Parameters
    ----------
    pruned, unpruned : ndarray
        (n,) mean scores of each unit, in [0, 1].
    retain : float
        Above 0.
    """
    return np.asarray(pruned) / retain - np.asarray(unpruned)


def convinced(gains: np.ndarray, alpha: float) -> bool:
    """Whether the wealth has ever reached ``1 / alpha``: then the mean of the gains is positive.

    That is wrong with a probability of at most ``alpha``, counted over all moments at which one could have looked.
    """
    return bool(log_wealth(gains).max(initial=-math.inf) >= -math.log(alpha))


def losses_of(pruned: np.ndarray, unpruned: np.ndarray, retain: float) -> np.ndarray:
    """What each unit says for "less than ``retain`` of the accuracy is retained", -1 at worst."""
    return retain * np.asarray(unpruned) - np.asarray(pruned)


def bounds(pruned: np.ndarray, unpruned: np.ndarray, alpha: float) -> Bounds:
    """Between which values the retained accuracy lies.

    Retained accuracy is the expected score of the pruned model over that of the unpruned one. Each end is wrong with a
    probability of at most ``alpha``, see `convinced`, which agrees with them: gains fall with ``retain``, losses grow.

    Parameters
    ----------
    pruned, unpruned : ndarray
        As in `gains_of`.
    alpha : float
        Error probability of each end.
    """
    low = _border(lambda retain: convinced(gains_of(pruned, unpruned, retain), alpha))
    high = _border(lambda retain: not convinced(losses_of(pruned, unpruned, retain), alpha))
    return Bounds(low, math.inf if high >= TOP else high)


def _border(holds: Callable[[float], bool]) -> float:
    """Up to where a statement holds that holds for small values and not for large ones."""
    if holds(TOP):
        return TOP
    low, high = 0.0, TOP  # 0 itself is never tried
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
