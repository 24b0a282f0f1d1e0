# SPDX-License-Identifier: Apache-2.0
"""Intervals cover what they promise; tests agree with textbook values."""

import numpy as np
import pytest
from scipy import stats

from vtoken.eval.statistics import accuracy, paired


def test_wilson_interval_of_independent_answers():
    found = accuracy([1.0] * 81 + [0.0] * 182)  # Newcombe (1998), table I: 81 of 263
    assert (found.value, found.low, found.high) == pytest.approx((0.3080, 0.2553, 0.3662), abs=5e-5)


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_equal_answers_still_leave_doubt(score):
    found = accuracy([score] * 40, ["a"] * 20 + ["b"] * 20)
    assert found.value == score
    assert 0.08 < found.high - found.low < 0.1


def test_one_picture_says_nothing_about_others():
    found = paired([1.0, 0.0], [0.0, 0.0], ["a", "a"])
    assert (found.difference.low, found.difference.high) == (-np.inf, np.inf)


def test_mcnemar_is_exact():
    baseline = [1.0] * 12 + [0.0] * 5 + [1.0] * 83
    scores = [0.0] * 12 + [1.0] * 5 + [1.0] * 83
    found = paired(scores, baseline)
    assert (found.lost, found.won) == (12, 5)
    assert found.difference.value == pytest.approx(-0.07)
    assert found.p_value == pytest.approx(2 * stats.binom.cdf(5, 17, 0.5))  # 0.143...


def test_no_difference_has_no_evidence():
    found = paired([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert (found.p_value, found.lost, found.won, found.difference.value) == (1.0, 0, 0, 0.0)


def test_graded_scores_get_a_permutation_test():
    rng = np.random.default_rng(0)
    baseline = rng.uniform(size=60)
    assert paired(np.clip(baseline - 0.2, 0, 1), baseline).p_value < 0.001
    assert paired(baseline + rng.normal(0, 0.1, 60), baseline).p_value > 0.01


def test_results_are_reproducible():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 2, (2, 100)).astype(float)
    assert paired(a, b) == paired(a, b)


def _clustered(rng, clusters=80, size=4, shift=0.0):
    """Right/wrong answers that share their picture's difficulty."""
    ease = rng.beta(2, 1, clusters).repeat(size)
    names = [str(i) for i in np.arange(clusters).repeat(size)]
    return (rng.uniform(size=clusters * size) < np.clip(ease + shift, 0, 1)).astype(float), names


def test_accuracy_intervals_cover_under_clustering():
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(150):
        scores, names = _clustered(rng)
        found = accuracy(scores, names)
        hits += found.low <= 2 / 3 <= found.high  # the mean of Beta(2, 1)
    assert 0.88 < hits / 150 <= 1.0


def test_difference_intervals_cover_under_clustering():
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(150):
        ease = rng.beta(2, 2, 80).repeat(4)
        names = [str(i) for i in np.arange(80).repeat(4)]
        baseline = (rng.uniform(size=320) < ease).astype(float)
        scores = (rng.uniform(size=320) < ease * 0.8).astype(float)
        found = paired(scores, baseline, names).difference
        hits += found.low <= -0.1 <= found.high  # E[0.8 e - e] with E[e] = 0.5
    assert 0.88 < hits / 150 <= 1.0


def test_clusters_widen_the_interval():
    scores, names = _clustered(np.random.default_rng(4), clusters=40, size=10)
    wide, narrow = accuracy(scores, names), accuracy(scores)
    assert wide.high - wide.low > 1.3 * (narrow.high - narrow.low)


def test_p_values_under_no_difference_are_not_too_small():
    rng = np.random.default_rng(5)
    found = [paired(*(rng.uniform(size=(2, 200)) < 0.7).astype(float)).p_value for _ in range(200)]
    assert np.mean(np.array(found) < 0.05) < 0.09
