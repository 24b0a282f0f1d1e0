# SPDX-License-Identifier: Apache-2.0
"""Accuracies and paired differences with their uncertainty; scipy and statsmodels do the maths.

Questions about one picture are not independent: intervals resample pictures (clusters), and tests flip the signs of
pictures, not of questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 2000
PERMUTATIONS = 9999
LEVEL = 0.95
_DOUBT = (float("-inf"), float("inf"))  # one picture says nothing about others
_TINY = 1e-12  # a resample in which the baseline has nothing right leaves the ratio unbounded


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
        Two-sided, of no difference; see `paired`.
    lost, won : int
        Questions that only the other, only this run got (more of): right to wrong, wrong to right.
    retained : Estimate or None
        Mean score over the other's; None if the other has none right.
    documents : int
        Questions that were compared.
    changed : int or None
        Questions whose answer reads differently.
    adjusted : float or None
        ``p_value`` corrected for the other rows of the table, see `holm`.
    """

    difference: Estimate
    p_value: float
    lost: int
    won: int
    retained: Estimate | None = None
    documents: int = 0
    changed: int | None = None
    adjusted: float | None = None


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
    if np.isin(values, (0.0, 1.0)).all() and (not grouped or np.ptp(values) == 0):
        interval = stats.binomtest(int(values.sum()), len(values)).proportion_ci(LEVEL, method="wilson")
        return Estimate(float(values.mean()), float(interval.low), float(interval.high))
    sums, sizes = _by_cluster(clusters, values, np.ones_like(values))
    return Estimate(float(values.mean()), *_bootstrap(sums, sizes))


def paired(scores: Sequence[float], baseline: Sequence[float], clusters: Sequence[str] | None = None) -> Paired:
    """Compare a run with a baseline, question by question.

    Differences and ratios get percentile intervals of a paired bootstrap over clusters. The p-value is McNemar's exact
    one where it applies: right/wrong scores, and no picture with several questions that changed. Else the signs of
    the pictures' summed differences are permuted; where both apply they are the same test.

    Parameters
    ----------
    scores, baseline : sequence of float
        Of the same questions in the same order.
    clusters : sequence of str, optional
        As in `accuracy`.
    """
    ours, theirs = np.asarray(scores, float), np.asarray(baseline, float)
    gain = ours - theirs
    sums, others, gains, sizes = _by_cluster(clusters, ours, theirs, gain, np.ones_like(gain))
    retained = None
    if others.sum() > 0:
        retained = Estimate(float(sums.sum() / others.sum()), *_bootstrap(sums, others))
    return Paired(
        Estimate(float(gain.mean()), *_bootstrap(gains, sizes)),
        _p_value(gains),
        lost=int((gain < 0).sum()),
        won=int((gain > 0).sum()),
        retained=retained,
        documents=len(gain),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm's step-down method)."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]] if p_values else []


def _by_cluster(clusters: Sequence[str] | None, *columns: np.ndarray) -> list[np.ndarray]:
    """The columns summed over each cluster."""
    if clusters is None:
        return list(columns)
    group = np.unique(np.asarray(clusters), return_inverse=True)[1]
    return [np.bincount(group, column) for column in columns]


def _p_value(gains: np.ndarray) -> float:
    """Of summed differences that are independent of each other; those that are 0 say nothing."""
    from statsmodels.stats.contingency_tables import mcnemar

    moved = gains[~np.isclose(gains, 0)]
    if len(moved) < 2:  # a single difference is as likely with the other sign
        return 1.0
    if np.isin(moved, (-1.0, 1.0)).all():
        table = [[0, int((moved < 0).sum())], [int((moved > 0).sum()), 0]]  # McNemar's test ignores the diagonal
        return float(mcnemar(table, exact=True).pvalue)
    test = stats.permutation_test(
        (moved,),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=PERMUTATIONS,
        batch=1000,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)


def _bootstrap(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
    """Interval of ``sum(above) / sum(below)``; the seed is fixed, so that a table can be reproduced."""
    if len(above) < 2:
        return _DOUBT
    found = stats.bootstrap(
        (above, below),
        lambda a, b, axis: a.sum(axis) / np.maximum(b.sum(axis), _TINY),
        paired=True,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)
