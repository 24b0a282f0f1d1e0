# SPDX-License-Identifier: Apache-2.0
"""Records: read back as written, of this version and of the first; refused if a newer one wrote them."""

import dataclasses
import json

import pytest
from taskfolder import write_task_folder

import vtoken
from vtoken.eval.errors import EvalError
from vtoken.eval.harness.tasksource import folder_tasks
from vtoken.eval.store.files import write_atomic
from vtoken.eval.store.record import FAILURE, RESULT, CellRecord, Failure, Result
from vtoken.eval.sweeps.cells import Cell

CELL = {
    "model": {
        "pretrained": "org/model",
        "weights": "0123",
        "model_type": "llava",
        "dtype": "bfloat16",
        "attn_implementation": None,
        "device": "auto",
        "positions": "keep",
        "preprocessing": "checkpoint",
    },
    "reducer": {"reducer": "todre", "keep": 0.25, "variant": "k_center", "tau": 0.2},
    "reducer_code": "",
    "reducer_files": "",
    "task": {"name": "mini", "version": "3", "fingerprint": "abcd"},
    "limit": 8,
    "seed": 0,
    "batch_size": 4,
    "versions": {"vtoken": "0.1.0", "torch": "2.15"},
}
"""As the first version of the files had it."""
RESULT_1 = {"metric": "exact_match", "metrics": {"exact_match,none": 0.5}, "documents": 8, "empty_answers": 1}
RESULT_1 |= {"prompts": "p", "dataset": "d", "seconds": 1.5}
FAILURE_1 = {"error": "shapes do not match", "traceback": "Traceback ...", "at": "2026-01-01T00:00:00+00:00"}


@pytest.fixture
def folder(tmp_path):
    """``folder("result.json", data)``: a cell's folder with that file."""

    def write(name, data):
        place = tmp_path / "c1"
        write_atomic(place / name, json.dumps(data))
        return place

    return write


def test_results_of_the_first_version_are_read(folder):
    found = CellRecord.read(folder(RESULT, {"id": "c1", "cell": CELL, **RESULT_1, "made_with": {"torch": "2.15"}}))
    assert found.result.model_dump() == {**RESULT_1, "left_out": {}}
    assert found.cell.model_dump() == CELL
    assert (found.id, found.failure, found.made_with) == ("c1", None, {"torch": "2.15"})
    assert (found.label, found.keep) == ("todre (k_center, tau=0.2)", 0.25)
    assert (found.recipe.device_map, found.recipe.device) == ("auto", None)


def test_failures_of_the_first_version_are_read(folder):
    found = CellRecord.read(folder(FAILURE, {"cell": {**CELL, "reducer": {"reducer": "not known here"}}, **FAILURE_1}))
    assert found.failure.model_dump() == {**FAILURE_1, "documents": []}
    assert (found.id, found.result, found.label) == ("c1", None, "not known here")


def test_a_task_of_a_folder_that_an_old_record_does_not_name_is_a_sentence(folder, checkpoint):
    old = {**CELL, "model": {"pretrained": str(checkpoint)}, "task": {"name": "colors", "version": "local"}}
    with pytest.raises(EvalError, match=r"does not say in which folder its task 'colors' is defined"):
        Cell.of(CellRecord.read(folder(RESULT, {"id": "c1", "cell": old, **RESULT_1})))


def test_what_a_newer_version_wrote_is_refused(folder):
    with pytest.raises(EvalError, match=r"written by a newer vtoken \(schema 99\)"):
        CellRecord.read(folder(RESULT, {"schema": 99, "whatever": 1}))


@pytest.mark.parametrize("data", [{}, {"id": "c1", "cell": {}}, {"schema": 2, "id": "c1"}, {"schema": 1, "cell": []}])
def test_what_is_no_record_counts_as_absent(folder, data):
    assert CellRecord.read(folder(RESULT, data)) is None


CHAIN = {"reducer": "chain", "stages": [{"reducer": "tower-prune", "keep": 0.5}, {"reducer": "pyramiddrop"}]}
REDUCERS = [None, "idpruner", {"reducer": "todre", "keep": 16, "variant": "k_center"}, CHAIN]


@pytest.mark.parametrize("spec", REDUCERS, ids=str)
@pytest.mark.parametrize("placed", [{"device": "cpu"}, {"device_map": "auto"}], ids=str)
def test_a_record_tells_how_to_run_the_cell_again(make_cell, tmp_path, spec, placed):
    """Everything but a hub id's branch, which the commit stands for, comes back, and so does the id."""
    (task,) = folder_tasks(str(write_task_folder(tmp_path / "tasks", "colors")))
    plain = make_cell(limit=3, batch_size=2, seed=7)
    changes = {"device": None, "dtype": "bfloat16", "attn_implementation": "eager", "positions": "paper", **placed}
    model = dataclasses.replace(plain.model, **changes)
    reducer = vtoken.get_reducer(spec) if spec else None
    cell = dataclasses.replace(plain, model=model, reducer=reducer, task=task)
    cell.record(Result(documents=3)).write(tmp_path / cell.id, [])
    again = Cell.of(CellRecord.read(tmp_path / cell.id))
    assert again == cell
    assert again.id == cell.id
    assert json.loads((tmp_path / cell.id / RESULT).read_text())["schema"] == 2


def test_a_result_is_read_before_an_older_failure(make_cell, tmp_path):
    cell = make_cell()
    cell.record(failure=Failure(error="boom")).write(tmp_path)
    assert CellRecord.read(tmp_path).failure.error == "boom"
    cell.record(Result(documents=8)).write(tmp_path, [])
    assert CellRecord.read(tmp_path).result.documents == 8
