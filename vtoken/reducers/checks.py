# SPDX-License-Identifier: Apache-2.0
"""Validation of hyper-parameters: one sentence each, with the value and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Any


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in list(choices):
        raise ValueError(f"{name}={value!r}: choose one of {list(choices)}.")


def check_number(name: str, value: object, low: float = -inf, high: float = inf, above: bool = False) -> None:
    """Raise ValueError unless ``value`` is a number in [low, high], or in (low, high] with ``above``."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not low <= value <= high or (above and value == low):  # type: ignore[operator]
        edge = f"above {low:g}" if above else f"of at least {low:g}"
        span = f" in [{low:g}, {high:g}]" if high < inf else "" if low == -inf else f" {edge}"
        raise ValueError(f"{name}={value!r}: give a number{span}.")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise ValueError unless ``value`` is an int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: give an int of at least {least}.")


def check_flag(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: give true or false.")


def check_block(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` names a block of the vision tower as `vtoken.EncoderRead` takes it."""
    if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, float) and 0 < value < 1)):
        raise ValueError(f"{name}={value!r}: give the number of a block of the vision tower, or a share in (0, 1).")


def check_place(name: str, value: object, least: int = 0) -> None:
    """Raise ValueError unless ``value`` is a decoder layer as `layer_at` takes it."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not whole and not (isinstance(value, float) and 0 < value < 1):
        raise ValueError(
            f"{name}={value!r} is no decoder layer: give its number, at least {least}, or a share of the depth in "
            "(0, 1) such as 0.5."
        )


def places(name: str, value: Any) -> tuple[int | float, ...]:
    """A non-empty tuple of decoder layers.

    Raises
    ------
    ValueError
        If ``value`` is no list of them.
    """
    if isinstance(value, (str, int, float)) or not isinstance(value, Iterable) or not (found := tuple(value)):
        raise ValueError(f"{name}={value!r}: give a list of decoder layers, as numbers or shares of the depth.")
    for place in found:
        check_place(name, place)
    return found


def layer_at(place: int | float, depth: int) -> int:
    """Decoder layer of a place: an int is the layer itself, a float in (0, 1) a share of the depth.

    >>> layer_at(0.5, 32), layer_at(3, 32)
    (16, 3)
    """
    return place if isinstance(place, int) else round(place * depth)
