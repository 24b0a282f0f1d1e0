# SPDX-License-Identifier: Apache-2.0
"""Median and spread of repeated measurements, ratios of runs that alternate, and when they mean nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import TypeVar

Result = TypeVar("Result")

WIDE = 0.25
"""Half the interquartile range of ratios, as a share of the ratio, beyond which it is noise."""
NEAR = 0.05
"""How near to 1 ratios may lie on both sides of it: then nothing is gained or lost, which is a finding."""


@dataclass(frozen=True)
class Spread:
    """Median and interquartile range of repeated measurements."""

    median: float
    iqr: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value; one alone has no spread."""
        if len(values) < 2:
            return cls(values[0], 0.0)
        low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(median(values), high - low)

    def __str__(self) -> str:
        return f"{self.median:.3g} ± {self.iqr / 2:.2g}"


@dataclass(frozen=True)
class Ratio:
    """How many times as fast the second of two things is, and the quartiles of that over rounds of both.

    Parameters
    ----------
    value, low, high : float
        The ratio that is told, and the quartiles of the ratios of single rounds; all equal for a single round.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, before: Sequence[float], after: Sequence[float], value: float | None = None) -> Ratio:
        """Of the times of at least one round; ``value`` is the median of the rounds' ratios by default."""
        ratios = [slow / max(fast, 1e-9) for slow, fast in zip(before, after, strict=True)]
        low, middle, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        return cls(middle if value is None else value, low, high)

    @property
    def noisy(self) -> bool:
        """Whether rounds disagree so much that the ratio says nothing.

        Either by more than 25 % around it, or on whether it is a gain or a loss, where these are more than 5 % each.
        """
        wide = self.high - self.low > 2 * WIDE * abs(self.value)
        return wide or self.low < 1 - NEAR < 1 + NEAR < self.high

    def __str__(self) -> str:
        return f"noisy {self.low:.2g}-{self.high:.2g}x" if self.noisy else f"{self.value:.2f}x"


def alternate(
    runs: Mapping[str, Callable[[], Result]],
    rounds: int,
    warmup: int = 1,
    step: Callable[[], object] = lambda: None,
) -> dict[str, list[Result]]:
    """Call every function once a round, so that a machine that gets slower meanwhile treats all alike.

    Parameters
    ----------
    runs : mapping
        Name -> what is measured.
    rounds, warmup : int
        Rounds whose results are returned, and rounds before them.
    step : callable
        Called after each run.
    """
    found: dict[str, list[Result]] = {name: [] for name in runs}
    for number in range(-warmup, rounds):
        for name, run in runs.items():
            result = run()
            step()
            if number >= 0:
                found[name].append(result)
    return found
