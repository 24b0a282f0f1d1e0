# SPDX-License-Identifier: Apache-2.0
"""Median and spread of repeated measurements, and runs that alternate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import TypeVar

Result = TypeVar("Result")


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


def alternate(runs: Mapping[str, Callable[[], Result]], rounds: int, warmup: int = 1) -> dict[str, list[Result]]:
    """Call every function once a round, so that a machine that gets slower meanwhile treats all alike.

    Parameters
    ----------
    runs : mapping
        Name -> what is measured.
    rounds, warmup : int
        Rounds whose results are returned, and rounds before them.
    """
    found: dict[str, list[Result]] = {name: [] for name in runs}
    for number in range(-warmup, rounds):
        for name, run in runs.items():
            result = run()
            if number >= 0:
                found[name].append(result)
    return found
