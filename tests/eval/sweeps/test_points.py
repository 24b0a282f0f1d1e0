# SPDX-License-Identifier: Apache-2.0
"""Entries of reducers: grids, own budgets, chains, presets and seeds."""

import pytest

from vtoken.eval.sweeps.points import expand, points


def configs(spec):
    return [
        {k: v for k, v in point.reducer.config().items() if k in ("reducer", "keep", "lam", "parallel")}
        for point in expand(spec)
    ]


def test_a_grid_makes_all_combinations():
    found = configs({"reducer": "idpruner", "parallel": 2, "grid": {"lam": [0.3, 0.5]}, "keep": [0.5, 16]})
    wanted = [(lam, keep) for lam in (0.3, 0.5) for keep in (0.5, 16)]
    assert found == [{"reducer": "idpruner", "parallel": 2, "lam": lam, "keep": keep} for lam, keep in wanted]


def test_lists_as_values_of_a_parameter_stay_lists():
    (point,) = expand({"reducer": "sparsevlm", "at": [1, 2]})
    assert tuple(point.reducer.at) == (1, 2)
    grid = expand({"reducer": "sparsevlm", "grid": {"at": [[1, 2], [3]]}})
    assert [tuple(point.reducer.at) for point in grid] == [(1, 2), (3,)]


def test_an_own_budget_wins_over_the_common_ones():
    own = [{"reducer": "uniform", "keep": 7}, {"reducer": "pooled", "grid": {"keep": [4, 9]}}]
    found = [(r.name, r.keep) for r in points(["random", *own], [0.5, 16])[1:]]
    assert found == [("random", 0.5), ("random", 16), ("uniform", 7), ("pooled", 4), ("pooled", 9)]


def test_without_common_budgets_reducers_have_their_defaults():
    (_, preset, default) = points(["zooprune-64", "fopru"])
    assert (preset.keep, default.keep) == (0.1112, 0.25)


def test_presets_take_parameters():
    (point,) = expand({"reducer": "prumerge-plus", "neighbours": 8})
    assert (point.reducer.plus, point.reducer.neighbours) == (True, 8)


def test_chains_expand_by_stage():
    stages = [{"reducer": "idpruner", "keep": [0.5, 0.4]}, {"reducer": "fastv", "grid": {"layer": [2, 3]}, "keep": 0.1}]
    found = [point.reducer.reducers for point in expand({"reducer": "chain", "stages": stages})]
    assert [(first.keep, second.layer) for first, second in found] == [(0.5, 2), (0.5, 3), (0.4, 2), (0.4, 3)]


def test_seeds_reach_reducers_that_draw_unless_they_have_their_own():
    chain = {"reducer": "chain", "stages": [{"reducer": "random", "keep": 0.5}, {"reducer": "fastv", "keep": 0.1}]}
    (_, plain, own, zero, chained) = points(
        ["random", {"reducer": "random", "seed": 9}, {"reducer": "random", "grid": {"seed": [0]}}, chain], seed=4
    )
    assert (plain.seed, own.seed, zero.seed, chained.reducers[0].seed) == (4, 9, 0, 4)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"reducer": "idpruner", "grid": {"lam": 0.3}}, r"grid\.lam=0\.3 is not possible: give a list"),
        ({"reducer": "idpruner", "grid": {"lam": []}}, r"grid\.lam=\[\] is not possible"),
        ({"reducer": "idpruner", "grid": ["lam"]}, r"grid=\['lam'\] is not possible: map parameters to lists"),
        ({"reducer": "idpruner", "grid": {"lamb": [1]}}, "Unknown parameter 'lamb' .*: did you mean 'lam'"),
        ({"reducer": "idpruner", "lam": 1, "grid": {"lam": [1]}}, "'lam' of 'idpruner' is given twice"),
        ({"reducer": "idpruner", "lam": [0.3, 0.5]}, r"lam=\[0\.3, 0\.5\]: give a number"),
        ({"reducer": "random", "keep": []}, r"keep=\[\] is not possible"),
        ({"reducer": "random", "keep": [2.0]}, r"keep=2\.0 is not a ratio"),
        ({"grid": {"lam": [1]}}, "needs the key 'reducer'"),
        ({"reducer": "chain"}, "at least one stage"),
        ({"reducer": "chain", "stages": ["randm"]}, "Unknown reducer 'randm': did you mean 'random'"),
    ],
)
def test_wrong_entries_are_a_sentence(spec, sentence):
    with pytest.raises(ValueError, match=sentence):
        expand(spec)
