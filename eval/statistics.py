# SPDX-License-Identifier: Apache-2.0
"""Accuracies and paired differences with their uncertainty; scipy does the maths.

Questions about one picture are not independent: intervals resample pictures (clusters), not questions. McNemar's test
looks at questions, as is customary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value and its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """A run against another one on the same questions.

    Parameters
    ----------
    difference : Estimate
        Mean score minus the other's.
    p_value : float
        Two-sided: exact McNemar for right/wrong scores, a sign-flip permutation test for others.
    lost, won : int
        Questions that only the other, only this run got (more of).
    """

    difference: Estimate
    p_value: float
    lost: int
    won: int


def accuracy(scores: Sequence[float], clusters: Sequence[str] | None = None) -> Estimate:
    """Mean score with a 95 % interval.

    Parameters
    ----------
    scores : sequence of float
        One per question.
    clusters : sequence of str, optional
        What each question is about; questions of one picture vary together. Without (or with one question a picture),
        right/wrong scores get Wilson's interval; else pictures are resampled. A bootstrap says nothing where all
        scores are equal, so those get Wilson's interval too.
    """
    values = np.asarray(scores, float)
    grouped = clusters is not None and len(set(clusters)) < len(values)
    if _binary(values) and (not grouped or np.ptp(values) == 0):
        interval = stats.binomtest(int(values.sum()), len(values)).proportion_ci(LEVEL, method="wilson")
        return Estimate(float(values.mean()), float(interval.low), float(interval.high))
    return Estimate(float(values.mean()), *_interval(values, clusters))


def paired(scores: Sequence[float], baseline: Sequence[float], clusters: Sequence[str] | None = None) -> Paired:
    """Compare a run with a baseline, question by question.

    Parameters
    ----------
    scores, baseline : sequence of float
        Of the same questions in the same order.
    clusters : sequence of str, optional
        As in `accuracy`.
    """
    gain = np.asarray(scores, float) - np.asarray(baseline, float)
    lost, won = int((gain < 0).sum()), int((gain > 0).sum())
    return Paired(Estimate(float(gain.mean()), *_interval(gain, clusters)), _p_value(gain, lost, won), lost, won)


def _binary(values: np.ndarray) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _p_value(gain: np.ndarray, lost: int, won: int) -> float:
    if lost + won == 0:
        return 1.0
    if np.isin(gain, (-1.0, 0.0, 1.0)).all():
        return float(stats.binomtest(won, lost + won).pvalue)
    test = stats.permutation_test(
        (gain,), np.mean, permutation_type="samples", vectorized=True, n_resamples=9999, rng=np.random.default_rng(0)
    )
    return float(test.pvalue)


def _interval(values: np.ndarray, clusters: Sequence[str] | None) -> tuple[float, float]:
    """Percentile bootstrap over clusters; the seed is fixed, so that a table can be reproduced."""
    names = np.arange(len(values)) if clusters is None else np.asarray(clusters)
    group = np.unique(names, return_inverse=True)[1]
    sums, sizes = np.bincount(group, values), np.bincount(group).astype(float)
    if len(sums) < 2:
        return float("-inf"), float("inf")  # one picture says nothing about others
    found = stats.bootstrap(
        (sums, sizes),
        lambda total, count, axis: total.sum(axis) / count.sum(axis),
        paired=True,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)
