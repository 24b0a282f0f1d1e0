# SPDX-License-Identifier: Apache-2.0
"""A cell's id changes with everything that decides its score, and with nothing else."""

import dataclasses
import json

import pytest

import vtoken
from vtoken.eval.harness.tasksource import resolve_tasks
from vtoken.eval.model.loading import ModelSpec
from vtoken.eval.sweeps.cells import grid, label, with_keeps
from vtoken.reducers.base import ScoreReducer

CHANGES = {
    "reducer": {"name": "idpruner", "keep": 0.5},
    "keep": {"name": "fopru", "keep": 0.25},
    "parameter": {"name": "fopru", "keep": 0.5, "strategy": "row"},
    "no reducer": {"name": None},
    "limit": {"name": "fopru", "keep": 0.5, "limit": 16},
    "batch size": {"name": "fopru", "keep": 0.5, "batch_size": 8},
    "seed": {"name": "fopru", "keep": 0.5, "seed": 1},
    "task": {"name": "fopru", "keep": 0.5, "task": "mini_attr"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_the_score_changes_the_id(make_cell, change):
    assert make_cell(**CHANGES[change]).id != make_cell("fopru", keep=0.5).id


@pytest.mark.parametrize("field", ["weights", "model_type"])
def test_other_weights_change_the_id(make_cell, field):
    cell = make_cell("fopru", keep=0.5)
    assert dataclasses.replace(cell, **{field: "other"}).id != cell.id


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"attn_implementation": "eager"}])
def test_another_way_to_compute_changes_the_id(make_cell, change):
    cell = make_cell("fopru", keep=0.5)
    assert dataclasses.replace(cell, model=dataclasses.replace(cell.model, **change)).id != cell.id


def test_the_number_of_the_device_does_not(make_cell):
    cell = make_cell()
    ids = {dataclasses.replace(cell, model=ModelSpec("x", device=device)).id for device in ("cuda:0", "cuda:1")}
    assert len(ids) == 1


def test_equal_cells_have_equal_ids_and_plain_configs(make_cell):
    cell = make_cell({"reducer": "chain", "stages": [{"reducer": "idpruner", "keep": 0.5}, {"reducer": "todre"}]})
    assert cell.id == dataclasses.replace(cell).id
    config = cell.identity.model_dump()
    assert json.loads(json.dumps(config)) == config


def test_editing_a_reducer_outside_of_the_package_changes_the_id(make_cell, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    ids = []
    for number in (1, 2):
        source = (
            f"import sys\nfrom tests_own import Own\nclass Mine(Own):\n    name = 'mine'\n    constant = {number}\n"
        )
        (tmp_path / f"mine{number}.py").write_text(source)
        (tmp_path / "tests_own.py").write_text(
            "from dataclasses import dataclass\nfrom vtoken.reducers.base import ScoreReducer\n"
            "@dataclass(frozen=True)\nclass Own(ScoreReducer):\n    def score(self, ctx): ...\n"
        )
        module = __import__(f"mine{number}")
        ids.append(dataclasses.replace(make_cell(), reducer=module.Mine(keep=0.5)).id)
    assert ids[0] != ids[1]


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ({"reducer": "fopru", "keep": 0.5}, "fopru"),
        ({"reducer": "fopru", "strategy": "row"}, "fopru (row)"),
        ({"reducer": "todre", "variant": "k_center", "tau": 0.2}, "todre (k_center, tau=0.2)"),
        (
            {"reducer": "chain", "stages": [{"reducer": "idpruner", "keep": 0.5}, {"reducer": "todre", "keep": 0.1}]},
            "idpruner 0.5 > todre 0.1",
        ),
    ],
)
def test_labels_name_what_differs_from_the_defaults(spec, wanted):
    assert label(vtoken.get_reducer(spec)) == wanted


def test_budgets_apply_to_reducers_that_have_one():
    assert [r.keep for r in with_keeps(vtoken.get_reducer("random"), [0.5, 16])] == [0.5, 16]
    chain = vtoken.get_reducer({"reducer": "chain", "stages": [{"reducer": "random", "keep": 0.5}]})
    assert with_keeps(chain, [0.5, 0.1]) == [chain]


def test_a_grid_holds_every_combination_once(checkpoint, private_cache):
    reducers = [None, vtoken.get_reducer("random", keep=0.5), vtoken.get_reducer("random", keep=0.5)]
    cells = grid([ModelSpec(str(checkpoint))], resolve_tasks(["mini_attr", "mini_count"]), reducers, limit=4)
    assert [(c.task.name, c.label) for c in cells] == [
        ("mini_attr", "unpruned"),
        ("mini_attr", "random"),
        ("mini_count", "unpruned"),
        ("mini_count", "random"),
    ]


def test_score_reducers_of_users_have_a_label():
    @dataclasses.dataclass(frozen=True)
    class Norm(ScoreReducer):
        name = "norm"
        power: float = 2.0

        def score(self, ctx):
            return ctx.features.norm(dim=-1)

    assert label(Norm(power=1.0)) == "norm (power=1.0)"


def test_a_retrained_checkpoint_is_another_cell(make_cell, tmp_path):
    path = tmp_path / "gate.safetensors"
    path.write_bytes(b"one")
    chained = {"reducer": "chain", "stages": ["random", {"reducer": "dyvte", "exit": "gate", "gate": str(path)}]}

    def ids():
        return [make_cell("dyvte", exit="gate", gate=str(path)).id, make_cell(chained).id]

    first = ids()
    assert ids() == first
    path.write_bytes(b"two")
    assert all(a != b for a, b in zip(first, ids(), strict=True))
    assert make_cell("dyvte").identity.reducer_files == ""
