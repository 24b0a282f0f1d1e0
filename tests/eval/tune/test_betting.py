# SPDX-License-Identifier: Apache-2.0
"""Bounds on retained accuracy: error rates by simulation, at the worst case and under constant looking."""

import math

import numpy as np
import pytest

from vtoken.eval.tune.betting import BETS, TOP, bounds, convinced, gains_of, log_wealth, losses_of

ALPHA = 0.05
RUNS, UNITS = 1500, 500


def noisy(rate, runs=RUNS):
    """Three standard errors above a rate."""
    return rate + 3 * math.sqrt(rate * (1 - rate) / runs)


def single(rng, retain, units=UNITS):
    """One question a unit, of which pruning turns as many as the target just allows, in both directions."""
    unpruned = (rng.random(units) < 0.9).astype(float)
    lost = 0.9 * (1 - retain) + 0.05 * 0.1
    pruned = np.where(unpruned == 1, rng.random(units) >= lost / 0.9, rng.random(units) < 0.05)
    return pruned.astype(float), unpruned


def grouped(rng, retain, units=UNITS):
    """Four questions a picture, which are lost together: some pictures are hard."""
    hard = rng.random(units) < 0.1
    unpruned = rng.binomial(4, 0.8, units) / 4
    return np.where(hard, unpruned * max(1 - 10 * (1 - retain), 0), unpruned), unpruned


def rare(rng, retain, units=UNITS):
    """All or nothing, and nothing seldom: where a normal approximation sees no loss for long."""
    return (rng.random(units) < retain).astype(float), np.ones(units)


CASES = [(single, 0.98), (single, 0.9), (grouped, 0.97), (grouped, 0.92), (rare, 0.98), (rare, 0.5)]


def test_the_cases_are_at_the_boundary():
    for case, retain in CASES:
        pruned, unpruned = case(np.random.default_rng(0), retain, 400_000)
        assert pruned.mean() / unpruned.mean() == pytest.approx(retain, abs=0.002)


@pytest.mark.parametrize(("case", "retain"), CASES)
def test_a_setting_at_the_target_passes_seldom_however_often_one_looks(case, retain):
    rng = np.random.default_rng(1)
    passed = sum(convinced(gains_of(*case(rng, retain), retain), ALPHA) for _ in range(RUNS))
    assert passed / RUNS <= noisy(ALPHA)


@pytest.mark.parametrize(("case", "retain"), CASES)
def test_nor_is_it_often_said_to_be_below(case, retain):
    rng = np.random.default_rng(2)
    refused = sum(convinced(losses_of(*case(rng, retain), retain), ALPHA) for _ in range(RUNS))
    assert refused / RUNS <= noisy(ALPHA)


def test_an_interval_for_one_moment_would_not_do():
    """The same cases are too hard for a normal approximation at every look: the test above can fail."""
    rng = np.random.default_rng(1)
    passed = 0
    for _ in range(RUNS):
        pruned, unpruned = rare(rng, 0.98)
        gains = gains_of(pruned, unpruned, 0.98)
        count = np.arange(1, len(gains) + 1)
        mean = gains.cumsum() / count
        error = np.sqrt(np.maximum((gains**2).cumsum() / count - mean**2, 0) / count)
        passed += bool((mean - 1.645 * error > 0)[31:].any())
    assert passed / RUNS > 3 * ALPHA


def test_it_has_the_power_to_pass_what_is_better():
    rng = np.random.default_rng(3)
    passed = 0
    for _ in range(200):
        pruned, unpruned = single(rng, 0.98)
        passed += convinced(gains_of(pruned, unpruned, 0.9), ALPHA)
    assert passed / 200 > 0.9


def test_no_loss_at_all_is_convincing_after_a_few_times_what_a_loss_would_cost():
    """Without any flip a 2 % margin needs about log(20) / 0.02 = 150 questions for one fixed bet."""
    gains = gains_of(np.ones(400), np.ones(400), 0.98)
    first = int(np.argmax(log_wealth(gains) >= -math.log(ALPHA)))
    assert 150 < first < 260


def test_wealth_is_that_of_gamblers_who_never_change_their_bet():
    gains = np.random.default_rng(0).uniform(-1, 1, 30)
    money = [[1 / len(BETS)] for _ in BETS]
    for gain in gains:
        for purse, bet in zip(money, BETS, strict=True):
            purse.append(purse[-1] * (1 + bet * gain))
    total = [sum(purse[i] for purse in money) for i in range(1, 31)]
    assert np.exp(log_wealth(gains)) == pytest.approx(total)


def test_a_bet_of_everything_that_is_lost_stays_lost():
    wealth = np.exp(log_wealth(np.array([-1.0, 1.0, 1.0])))
    assert wealth[0] == pytest.approx(sum(1 - bet for bet in BETS) / len(BETS))
    assert wealth[2] == pytest.approx(sum((1 - bet) * (1 + bet) ** 2 for bet in BETS) / len(BETS))


def test_bounds_are_where_the_test_turns():
    pruned, unpruned = single(np.random.default_rng(4), 0.9)
    low, high = bounds(pruned, unpruned, ALPHA)
    tried = np.arange(0.7, 1.1, 0.002)
    passing = [retain for retain in tried if convinced(gains_of(pruned, unpruned, retain), ALPHA)]
    below = [retain for retain in tried if convinced(losses_of(pruned, unpruned, retain), ALPHA)]
    assert max(passing) == pytest.approx(low, abs=0.002)
    assert min(below) == pytest.approx(high, abs=0.002)
    assert low < pruned.sum() / unpruned.sum() < high


def test_little_says_little():
    low, high = bounds(np.ones(2), np.ones(2), ALPHA)
    assert low < 0.5
    assert high == math.inf
    assert bounds(np.zeros(100), np.zeros(100), ALPHA) == (0.0, math.inf)
    assert bounds(np.ones(500), np.zeros(500), ALPHA).low == TOP
