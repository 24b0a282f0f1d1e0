# SPDX-License-Identifier: Apache-2.0
"""Rows over seeds: means, the spread between seeds, and comparisons with what belongs together."""

import dataclasses

import pytest
from finished import made_up_run

from vtoken.eval.comparison.seeds import counterpart, over_seeds
from vtoken.eval.comparison.summary import rows_of
from vtoken.eval.report.columns import lines_of, shown

RIGHT = {0: [1, 0, 0, 0], 1: [1, 1, 0, 0], 2: [1, 1, 1, 0]}
"""Scores of `random` on four questions, by seed."""


def run(label, scores, seed=None, **changes):
    samples = [
        {
            "doc_id": i,
            "cluster": str(i),
            "prompt": f"p{i}",
            "target": "yes",
            "kind": "",
            "score": float(score),
            "answer": "yes" if score else f"no, {label}",
            "tokens": {"visual_kept": 10 + (seed or 0)},
        }
        for i, score in enumerate(scores)
    ]
    found = made_up_run(label, samples)
    cell = found.record.cell.model_copy(update={"seed": seed, **changes})
    record = found.record.model_copy(update={"id": f"{label}-{seed}", "cell": cell})
    return dataclasses.replace(found, record=record)


@pytest.fixture
def runs():
    return [
        run("unpruned", [1, 1, 1, 1]),
        run("random", RIGHT[0], 0),
        run("fopru", [1, 1, 1, 0]),
        run("random", RIGHT[1], 1),
        run("random", RIGHT[2], 2),
    ]


def test_one_row_a_reducer_with_mean_and_spread(runs):
    rows = rows_of(over_seeds(runs))
    assert [row.reducer for row in rows] == ["unpruned", "random", "fopru"]
    random = rows[1]
    assert (random.accuracy.value, random.seeds, random.seed) == (pytest.approx(0.5), 3, None)
    assert random.seed_spread == pytest.approx(0.25)  # of 0.25, 0.5 and 0.75
    assert random.accuracy.low < 0.5 < random.accuracy.high, "the interval is over questions"
    assert random.visual_kept == 11
    assert random.versus_unpruned.difference.value == pytest.approx(-0.5)
    assert random.versus_unpruned.changed is None
    assert (rows[2].seeds, rows[2].seed_spread) == (1, None)
    assert rows[2].versus_random.difference.value == pytest.approx(0.25), "against the mean over the seeds of random"
    columns = shown(rows)
    cells = dict(zip([column.title for column in columns], lines_of(columns, rows)[1], strict=True))
    assert cells["± seeds"] == "25.0 (3)"
    assert "seed" not in cells


def test_by_seed_every_run_is_compared_with_that_of_its_seed(runs):
    rows = rows_of([*runs, run("zooprune", [1, 0, 0, 0], 1)])
    assert [row.seed for row in rows] == [None, 0, None, 1, 2, 1]
    assert rows[5].versus_random.difference.value == -0.25, "random of seed 1 has two right"
    assert [row.versus_unpruned.difference.value for row in rows if row.reducer == "random"] == [-0.75, -0.5, -0.25]
    assert "seed" in [column.title for column in shown(rows)]
    assert "± seeds" not in [column.title for column in shown(rows)]


def test_questions_that_one_seed_lacks_are_not_counted(runs):
    short = dataclasses.replace(runs[4], samples=runs[4].samples[:2])
    (random,) = [row for row in rows_of(over_seeds([*runs[:4], short])) if row.reducer == "random"]
    assert (random.documents, random.accuracy.value) == (2, pytest.approx((1 + 2 / 3) / 2))


def test_other_code_and_other_budgets_are_no_seeds(runs):
    other = run("random", RIGHT[1], 1, versions={"vtoken code": "other"})
    small = run("random", RIGHT[1], 1, reducer={"reducer": "random", "keep": 0.1})
    assert len(over_seeds([runs[1], other, small])) == 3


def test_failed_seeds_stay_alone(runs):
    failed = dataclasses.replace(runs[4], samples=())
    found = over_seeds([*runs[:4], failed])
    assert [(one.reducer, len(one.by_seed)) for one in found] == [
        ("unpruned", 0),
        ("random", 2),
        ("fopru", 0),
        ("random", 0),
    ]


def test_without_a_counterpart_there_is_none(runs):
    assert counterpart(runs[0], []) is None
