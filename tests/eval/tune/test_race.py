# SPDX-License-Identifier: Apache-2.0
"""Who is asked on, who is out and who has won, with made-up scores; error rates of the whole race by simulation."""

import math

import numpy as np
import pytest

from vtoken.eval.tune.race import ERROR, Race, Setting, Verdict
from vtoken.eval.tune.units import looks

RETAIN = 0.9


def settings(*reducers, keeps=(0.5, 0.25, 0.1)):
    """Every reducer at every budget, which it costs."""
    return [
        Setting(reducer, keep, keep + number / 100, keep) for number, reducer in enumerate(reducers) for keep in keeps
    ]


def run(race, retained, rng, accuracy=0.9, tasks=1):
    """Race with settings of true retained accuracies, name -> share; returns how many units each was asked."""
    unpruned = (rng.random((race.units, tasks)) < accuracy).astype(float)
    scores = {}
    for name, share in sorted(retained.items()):
        scores[name] = unpruned * (rng.random(unpruned.shape) < share)
    start = 0
    for end in looks(race.units):
        for standing in race.open:
            standing.add(scores[standing.setting.name][start:end], unpruned[start:end])
        race.judge()
        start = end
    return race


def of(race, name):
    return next(standing for standing in race.standings if standing.setting.name == name)


def same(race, share):
    return {standing.setting.name: share for standing in race.standings}


def test_the_cheapest_that_holds_is_chosen():
    race = Race(settings("a", "b"), RETAIN, 800)
    retained = {"a 0.5": 1.0, "a 0.25": 1.0, "a 0.1": 0.6, "b 0.5": 1.0, "b 0.25": 0.5, "b 0.1": 0.4}
    run(race, retained, np.random.default_rng(0))
    assert race.best.setting.name == "a 0.25"
    assert of(race, "a 0.1").verdict is Verdict.BELOW
    assert of(race, "b 0.25").verdict is Verdict.BELOW
    assert of(race, "b 0.1").verdict in (Verdict.AFTER, Verdict.BELOW)
    assert of(race, "a 0.1").units < 150


def test_at_the_target_a_wrong_choice_is_rare_in_the_whole_race():
    """All nine settings lose a little too much: any choice is wrong."""
    runs, rng = 250, np.random.default_rng(1)
    wrong = 0
    for _ in range(runs):
        race = Race(settings("a", "b", "c"), RETAIN, 400)
        wrong += run(race, same(race, RETAIN), rng).best is not None
    assert wrong / runs <= ERROR + 3 * math.sqrt(ERROR * (1 - ERROR) / runs)


def test_budgets_cost_no_error_where_the_largest_one_is_good():
    """The second of each chain is at the target: the worst case of a fixed sequence."""
    runs, rng = 250, np.random.default_rng(2)
    wrong = right = 0
    for _ in range(runs):
        race = Race(settings("a", "b"), RETAIN, 400)
        good = {name: 1.0 if name.endswith("0.5") else RETAIN for name in same(race, 0)}
        best = run(race, good, rng).best
        right += best is not None
        wrong += best is not None and best.setting.keep != 0.5
    assert right / runs > 0.95
    assert wrong / runs <= ERROR + 3 * math.sqrt(ERROR * (1 - ERROR) / runs)


def test_a_budget_counts_after_the_larger_ones_only():
    race = Race(settings("a"), RETAIN, 400)
    ones = np.ones((200, 1))
    of(race, "a 0.25").add(ones, ones)
    race.judge()
    assert of(race, "a 0.25").shown
    assert race.best is None
    of(race, "a 0.5").add(ones, ones)
    race.judge()
    assert race.best is of(race, "a 0.25")


def test_a_budget_after_one_that_fails_cannot_count():
    race = Race(settings("a"), RETAIN, 400)
    ones = np.ones((200, 1))
    of(race, "a 0.25").add(ones, ones)
    of(race, "a 0.5").add(0 * ones, ones)
    race.judge()
    assert [of(race, f"a {keep}").verdict for keep in (0.5, 0.25, 0.1)] == [Verdict.BELOW, Verdict.AFTER, Verdict.AFTER]
    assert race.best is None
    assert race.open == []


def test_what_cannot_be_cheaper_any_more_is_not_asked():
    race = Race(settings("a", "b"), RETAIN, 400)
    ones = np.ones((200, 1))
    for keep in (0.5, 0.25):
        of(race, f"a {keep}").add(ones, ones)
    of(race, "b 0.1").fail("broken")
    race.judge()
    assert race.best is of(race, "a 0.25")
    assert of(race, "b 0.25").verdict is Verdict.COSTLIER
    assert of(race, "b 0.5").verdict is Verdict.COSTLIER
    assert race.open == [of(race, "a 0.1")]


def test_a_costly_one_is_asked_as_long_as_a_cheap_one_needs_it():
    race = Race(settings("a", "b"), RETAIN, 400)
    ones = np.ones((200, 1))
    of(race, "a 0.5").add(ones, ones)
    race.judge()
    assert race.best is of(race, "a 0.5")
    assert of(race, "b 0.5") in race.open


def test_what_is_not_cheaper_than_the_unpruned_model_takes_no_part():
    race = Race([Setting("a", 0.5, 1.02, 0.5), Setting("a", 0.25, 0.7, 0.25), Setting("b", 0.5, 1.2, 0.5)], RETAIN, 400)
    assert [standing.setting.name for standing in race.open] == ["a 0.25"]
    assert race.alpha == ERROR
    assert of(race, "b 0.5").verdict is Verdict.NO_GAIN


def test_what_cannot_be_decided_is_given_up_and_says_how_many_would_decide():
    """Without a loss a 2 % margin needs some 200 units: 60 are not enough, and the projection is about right."""
    race = Race(settings("a", keeps=(0.5,)), 0.98, 60)
    run(race, {"a 0.5": 1.0}, np.random.default_rng(0), accuracy=1.0)
    standing = of(race, "a 0.5")
    assert standing.verdict is Verdict.HOPELESS
    total = standing.units + race.needed(standing)
    again = Race(settings("a", keeps=(0.5,)), 0.98, round(1.1 * total))
    assert run(again, {"a 0.5": 1.0}, np.random.default_rng(0), accuracy=1.0).best is not None
    assert standing.units == 32


def test_no_number_of_questions_decides_for_one_that_is_below():
    race = Race(settings("a", keeps=(0.5,)), 0.98, 200)
    run(race, {"a 0.5": 0.9}, np.random.default_rng(0))
    assert race.needed(of(race, "a 0.5")) is None


def test_tasks_count_alike():
    race = Race(settings("a", keeps=(0.5,)), RETAIN, 400)
    standing = of(race, "a 0.5")
    standing.add(np.array([[1.0, 0.5]]), np.array([[1.0, 1.0]]))
    assert standing.retained == 0.75
    assert standing.by_task == [1.0, 0.5]


def test_the_front_is_made_of_those_that_retain_more_than_all_cheaper_ones():
    race = Race(settings("a", "b"), RETAIN, 400)
    ones = np.ones((10, 1))
    for name, share in (("a 0.1", 0.5), ("b 0.1", 0.4), ("b 0.25", 0.8), ("a 0.5", 0.8), ("b 0.5", 0.9)):
        of(race, name).add(share * ones, ones)
    assert [standing.setting.name for standing in race.front] == ["a 0.1", "b 0.25", "b 0.5"]


@pytest.mark.parametrize("units", [1, 31, 32, 33, 500, 5000])
def test_one_looks_more_and_more_seldom_and_at_the_end(units):
    moments = looks(units)
    assert moments[-1] == units
    assert moments == sorted(set(moments))
    assert moments[0] == min(units, 32)
