# SPDX-License-Identifier: Apache-2.0
"""Results are there completely or not at all."""

import multiprocessing
import os

import pytest

from vtoken.eval.errors import EvalError
from vtoken.eval.store.files import write_atomic
from vtoken.eval.store.record import FAILURE, RESULT, SAMPLES, CellRecord, Failure, Result
from vtoken.eval.store.results import ANSWERS, PROFILE, Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "results")


def record(cell="c1", documents=1, **found):
    identity = {"model": {"pretrained": "m"}, "task": {"name": "t"}}
    return CellRecord(id=cell, cell=identity, label="unpruned", **(found or {"result": Result(documents=documents)}))


def test_saves_and_loads_a_cell(store):
    store.save(record(documents=2), [{"doc_id": 0, "answer": "ä"}, {"doc_id": 1, "answer": "b\nc"}])
    assert store.result("c1") == Result(documents=2)
    assert [sample["answer"] for sample in store.samples("c1")] == ["ä", "b\nc"]


def test_a_finished_cell_has_no_log_and_no_failure_left(store):
    store.save_failure(record(failure=Failure(error="boom")))
    assert store.failure("c1").error == "boom"
    write_atomic(store.path("c1", ANSWERS), "x")
    store.save(record(), [])
    assert store.failure("c1") is None
    assert not store.path("c1", ANSWERS).exists()


def test_a_finished_cell_leaves_no_logs_and_no_half_written_files(store):
    for name in (ANSWERS, "answers-1.jsonl", ".result.json.x1.part"):
        write_atomic(store.path("c1", name), "x")
    assert [path.name for path in store.answers("c1")] == ["answers-1.jsonl", ANSWERS]
    store.save(record(), [])
    assert sorted(path.name for path in store.path("c1", "").iterdir()) == [RESULT, SAMPLES]


def die_with_the_lock(store, cell):
    with store.lock(cell).attempt():
        os._exit(0)


def test_what_a_runner_left_that_died_right_after_the_result_is_removed(store):
    store.save(record(), [])
    store.save_profile("c1", {})
    dead = multiprocessing.get_context("fork").Process(target=die_with_the_lock, args=(store, "c1"))
    dead.start()
    dead.join()
    for name in (ANSWERS, FAILURE, ".profile.json.x1.part"):
        store.path("c1", name).write_text("x")
    assert store.lock("c1").holder == dead.pid
    assert store.settle("c1")
    assert sorted(path.name for path in store.path("c1", "").iterdir()) == [PROFILE, RESULT, SAMPLES]
    assert not store.lock("c1").exists


def test_a_living_runner_removes_its_own_files(store):
    with store.lock("c1").attempt():
        store.save(record(), [])
        store.path("c1", ANSWERS).write_text("x")
        assert store.settle("c1")
        assert store.path("c1", ANSWERS).exists()
        assert store.lock("c1").exists


def test_a_cell_without_a_result_keeps_its_answers(store):
    write_atomic(store.path("c1", ANSWERS), "x")
    assert not store.settle("c1")
    assert store.path("c1", ANSWERS).exists()


def test_samples_without_a_result_are_not_a_finished_cell(store):
    write_atomic(store.path("c1", SAMPLES), "{}\n")
    assert store.result("c1") is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_damaged_result_counts_as_absent(store, text):
    write_atomic(store.path("c1", RESULT), text)
    assert store.result("c1") is None


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_file(store, monkeypatch, where):
    path = store.path("c1", RESULT)
    write_atomic(path, "old")

    def crash(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, where, crash)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == [RESULT]


def test_discard_forgets_one_cell_only(store):
    for name in ("c1", "c2"):
        store.save(record(name), [])
    store.discard("c1")
    store.discard("never there")
    assert (store.result("c1"), store.result("c2")) == (None, Result(documents=1))


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EvalError, match=r"results folder .* cannot be written"):
        Store(tmp_path / "file" / "results")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_a_sentence(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(EvalError, match="Permission denied"):
        Store(tmp_path / "results")
