# SPDX-License-Identifier: Apache-2.0
"""Intervals cover what they promise; tests agree with textbook values."""

import numpy as np
import pytest
from scipy import stats

from vtoken.eval.comparison import statistics
from vtoken.eval.comparison.statistics import accuracy, holm, paired


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


@pytest.fixture
def quick(monkeypatch):
    """Fewer resamples: simulations average over many data sets anyway."""
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    monkeypatch.setattr(statistics, "PERMUTATIONS", 499)


@pytest.fixture
def only_tests(quick, monkeypatch):
    """No intervals."""
    monkeypatch.setattr(statistics, "_bootstrap", lambda above, below: (0.0, 0.0))


CLUSTERS, SIZE = 60, 4
NAMES = [str(number) for number in np.arange(CLUSTERS).repeat(SIZE)]


def pictures(rng, loss=0.2, spread=0.5):
    """Right/wrong answers of two models; questions about a picture share its difficulty and what is lost on it.

    Per picture: ease e ~ Beta(4, 2), mean 2/3; the reduced model loses a share of e with mean ``loss``, all or nothing
    for ``spread`` near 1.
    """
    ease = rng.beta(4, 2, CLUSTERS).repeat(SIZE)
    lost = np.where(rng.uniform(size=CLUSTERS) < spread, rng.uniform(size=CLUSTERS) < loss, loss).repeat(SIZE)
    drawn = rng.uniform(size=CLUSTERS * SIZE)
    return (drawn < ease * (1 - lost)).astype(float), (drawn < ease).astype(float)


def coverage(intervals, truth):
    return np.mean([low <= truth <= high for low, high in intervals])


SIMULATIONS = 250  # the standard error of a coverage of 95 % is 1.4 points


def test_accuracy_intervals_cover_under_clustering_and_only_with_it(quick):
    rng = np.random.default_rng(2)
    found = [pictures(rng)[1] for _ in range(SIMULATIONS)]
    with_pictures = [(e.low, e.high) for e in (accuracy(scores, NAMES) for scores in found)]
    without = [(e.low, e.high) for e in (accuracy(scores) for scores in found)]
    assert 0.93 <= coverage(with_pictures, 2 / 3) <= 0.97
    assert coverage(without, 2 / 3) < 0.93


def test_intervals_of_difference_and_ratio_cover_under_clustering_and_only_with_it(quick):
    rng = np.random.default_rng(3)
    found = [pictures(rng) for _ in range(SIMULATIONS)]
    grouped = [paired(*scores, NAMES) for scores in found]
    assert 0.93 <= coverage([(p.difference.low, p.difference.high) for p in grouped], -0.2 * 2 / 3) <= 0.97
    assert 0.93 <= coverage([(p.retained.low, p.retained.high) for p in grouped], 0.8) <= 0.97
    single = [paired(*scores) for scores in found]
    assert coverage([(p.difference.low, p.difference.high) for p in single], -0.2 * 2 / 3) < 0.9
    assert coverage([(p.retained.low, p.retained.high) for p in single], 0.8) < 0.9


def test_intervals_of_independent_questions_cover(quick):
    rng = np.random.default_rng(4)
    inside = []
    for _ in range(SIMULATIONS):
        drawn = rng.uniform(size=150)
        found = paired((drawn < 0.7 * (rng.uniform(size=150) < 0.8)).astype(float), (drawn < 0.7).astype(float))
        inside.append((found.difference.low, found.difference.high))
    assert 0.93 <= coverage(inside, -0.14) <= 0.97


def swapped(rng):
    """Two equally good models: in every picture where they differ, one of them, by a coin, has all that is right."""
    whole = rng.uniform(size=CLUSTERS * SIZE) < 0.7
    poor = whole & np.repeat(rng.uniform(size=CLUSTERS) < 0.6, SIZE)
    heads = np.repeat(rng.uniform(size=CLUSTERS) < 0.5, SIZE)
    return np.where(heads, whole, poor).astype(float), np.where(heads, poor, whole).astype(float)


def rejected(p_values):
    return np.mean(np.array(p_values) < 0.05)


def test_false_alarms_under_clustering_are_as_rare_as_they_should_be(only_tests):
    rng = np.random.default_rng(5)
    found = [swapped(rng) for _ in range(SIMULATIONS)]
    assert 0.03 <= rejected([paired(*scores, NAMES).p_value for scores in found]) <= 0.07
    assert rejected([paired(*scores).p_value for scores in found]) > 0.15  # questions taken for independent


def test_false_alarms_of_mcnemar_and_of_graded_scores(only_tests):
    rng = np.random.default_rng(6)
    binary = [paired(*(rng.uniform(size=(2, 200)) < 0.7).astype(float)).p_value for _ in range(SIMULATIONS)]
    graded = [paired(*rng.uniform(size=(2, 60))).p_value for _ in range(SIMULATIONS)]
    assert 0.01 <= rejected(binary) <= 0.06  # exact tests are conservative
    assert 0.03 <= rejected(graded) <= 0.07


def test_real_losses_are_found(only_tests):
    rng = np.random.default_rng(7)
    assert rejected([paired(*pictures(rng), NAMES).p_value for _ in range(50)]) > 0.95


def test_pictures_with_one_changed_question_each_get_mcnemar():
    names = [str(i // 2) for i in range(40)]
    baseline = np.ones(40)
    scores = np.where(np.arange(40) % 4 == 0, 0.0, 1.0)  # one question of every other picture is lost
    assert paired(scores, baseline, names).p_value == pytest.approx(2 * 0.5**10)


def test_holm_steps_down():
    # Holm (1979): (m - i + 1) p_(i), made monotone
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_holm_keeps_false_alarms_of_a_whole_table_rare(monkeypatch):
    monkeypatch.setattr("gc.collect", lambda *args: 0)  # statsmodels collects garbage in every call: 0.4 s each
    rng = np.random.default_rng(8)
    tables = rng.uniform(size=(500, 20))
    assert 0.03 <= np.mean([min(holm(list(table))) < 0.05 for table in tables]) <= 0.065
    assert np.mean(tables.min(1) < 0.05) > 0.5


def test_what_is_retained():
    found = paired([1.0] * 60 + [0.0] * 40, [1.0] * 80 + [0.0] * 20)
    assert found.retained.value == pytest.approx(0.75)
    assert 0.6 < found.retained.low < 0.72
    assert paired([1.0, 0.0], [0.0, 0.0]).retained is None


def test_clusters_widen_the_interval():
    scores, _ = pictures(np.random.default_rng(9))
    wide, narrow = accuracy(scores, NAMES), accuracy(scores)
    assert wide.high - wide.low > 1.15 * (narrow.high - narrow.low)


def test_a_single_difference_proves_nothing():
    """One picture whose questions moved together, or one partial score: both signs are as likely."""
    assert paired([1, 1, 0.5, 0], [1, 1, 0, 0]).p_value == 1.0
    assert paired([1, 1, 0, 0], [0, 0, 0, 0], ["a", "a", "b", "c"]).p_value == 1.0
