# SPDX-License-Identifier: Apache-2.0
"""Cells are run once, resumed in their middle, and fail without a score."""

import shutil

import pytest

import vtoken
from vtoken.eval.comparison.summary import summarize
from vtoken.eval.errors import EvalError
from vtoken.eval.running.attempt import Status
from vtoken.eval.running.listener import Listener
from vtoken.eval.running.runner import Runner
from vtoken.eval.store.lock import CellLock, LockLostError
from vtoken.eval.store.results import ANSWERS, Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


@pytest.fixture(scope="module")
def loaded():
    """One loaded model for all tests of this file."""
    return {}


@pytest.fixture
def runner(store, loaded):
    runner = Runner(store)
    runner._loaded = loaded.get("model")
    yield runner
    loaded["model"] = runner._loaded


class Broken(vtoken.Random):
    """Raises at the n-th prefill."""

    name = "broken"
    calls = 0
    die_at = 1
    error = RuntimeError("shapes do not match")

    def before_llm(self, ctx):
        Broken.calls += 1
        if Broken.calls == Broken.die_at:
            raise Broken.error
        return super().before_llm(ctx)


@pytest.fixture
def broken(make_cell, monkeypatch):
    import dataclasses

    monkeypatch.setattr(Broken, "calls", 0)
    monkeypatch.setattr(Broken, "die_at", 1)
    monkeypatch.setattr(Broken, "error", RuntimeError("shapes do not match"))
    return dataclasses.replace(make_cell(), reducer=Broken(keep=0.5))


def test_runs_cells_and_records_everything(runner, store, make_cell):
    cells = [make_cell(), make_cell("fopru", keep=0.25)]
    outcome = runner.run(cells)
    assert (outcome.finished, outcome.skipped, outcome.failed) == (cells, [], [])
    record, samples = store.record(cells[1].id), store.samples(cells[1].id)
    result = store.result(cells[1].id)
    assert (result.metric, result.documents, record.keep) == ("exact_match", 8, 0.25)
    assert {"torch", "transformers", "lmms-eval", "vtoken"} <= set(record.made_with)
    assert [sample["doc_id"] for sample in samples] == list(range(8))
    assert {sample["tokens"]["visual_kept"] for sample in samples} == {36}
    assert len({sample["kind"] for sample in samples}) == 8
    assert not store.path(cells[1].id, ANSWERS).exists()


def test_finished_cells_are_not_run_again(runner, store, make_cell):
    cells = [make_cell(), make_cell("random", keep=0.25)]
    runner.run(cells[:1])
    before = store.path(cells[0].id, "result.json").read_bytes()
    outcome = runner.run(cells)
    assert (outcome.skipped, outcome.finished) == (cells[:1], cells[1:])
    assert store.path(cells[0].id, "result.json").read_bytes() == before


def test_a_raising_cell_has_no_score_and_stops_nothing(runner, store, make_cell, broken):
    other = make_cell("random", keep=0.25)
    outcome = runner.run([broken, other])
    assert (outcome.failed, outcome.finished) == ([broken], [other])
    assert store.result(broken.id) is None
    assert "shapes do not match" in store.failure(broken.id).error
    assert "Traceback" in store.failure(broken.id).traceback
    row = summarize([broken], store)[0]
    assert (row.error, row.accuracy) == ("documents 0 to 3 of task 'mini': shapes do not match", None)
    assert store.failure(broken.id).documents == [0, 1, 2, 3]


def test_a_failed_cell_is_tried_again(runner, store, broken):
    runner.run([broken])
    assert runner.run([broken]).finished == [broken]
    assert store.failure(broken.id) is None


@pytest.mark.parametrize("error", [RuntimeError("killed"), KeyboardInterrupt()])
def test_a_cell_goes_on_in_its_middle(runner, store, broken, error):
    whole = Store(store.root / "undisturbed")
    Broken.die_at = -1
    undisturbed = Runner(whole)
    undisturbed._loaded = runner._loaded
    undisturbed.run([broken])

    Broken.calls, Broken.die_at, Broken.error = 0, 2, error
    try:
        runner.run([broken])
    except KeyboardInterrupt:
        assert isinstance(error, KeyboardInterrupt)
    assert store.result(broken.id) is None
    assert store.path(broken.id, ANSWERS).read_text().count("\n") == 4  # the first batch
    Broken.calls, Broken.die_at = 0, -1
    runner.run([broken])
    assert Broken.calls == 1  # the second batch only
    assert store.samples(broken.id) == whole.samples(broken.id)


def test_an_interrupt_loses_no_finished_cell_and_leaves_the_model_clean(runner, store, make_cell, broken):
    Broken.error = KeyboardInterrupt()
    first, last = make_cell(), make_cell("random", keep=0.25)
    with pytest.raises(KeyboardInterrupt):
        runner.run([first, broken, last])
    assert store.result(first.id) is not None
    assert store.failure(broken.id) is None
    assert runner.run([first, broken, last]).skipped == [first]


def test_listeners_hear_everything(runner, make_cell, broken):
    heard = []

    class Ears(Listener):
        def started(self, cell):
            heard.append("started")

        def answered(self, cell, count):
            heard.append(count)

        def finished(self, cell, result):
            heard.append("finished")

        def failed(self, cell, failure):
            heard.append("failed")

    runner.listener = Ears()
    runner.run([make_cell(), broken])
    assert heard == ["started", 4, 4, "finished", "started", "failed"]


def test_a_task_that_cannot_be_loaded_is_tried_once(runner, store, make_cell, monkeypatch):
    import tenacity

    calls = []

    @tenacity.retry(stop=tenacity.stop_after_attempt(2))
    def unreachable(*key):
        calls.append(key)
        raise OSError("the hub cannot be reached")

    monkeypatch.setattr("vtoken.eval.running.runner.load_task", unreachable)
    cells = [make_cell(), make_cell("random", keep=0.5)]
    assert runner.run(cells).failed == cells
    assert len(calls) == 2
    assert {store.failure(cell.id).error for cell in cells} == {"the hub cannot be reached"}


@pytest.fixture
def unloadable(checkpoint, make_cell, tmp_path):
    """Two cells of a model whose weights are damaged."""
    copy = shutil.copytree(checkpoint, tmp_path / "damaged")
    (copy / "model.safetensors").write_bytes(b"garbage" * 1000)
    return [make_cell(model=copy), make_cell("random", keep=0.5, model=copy)]


def test_a_model_that_cannot_be_loaded_fails_its_cells_and_is_tried_once(runner, store, make_cell, unloadable):
    loads = []
    runner.listener.loading = loads.append
    other = make_cell("random", keep=0.25)
    outcome = runner.run([*unloadable, other])
    assert (outcome.failed, outcome.finished) == (unloadable, [other])
    assert loads.count(unloadable[0].model) == 1
    for cell in unloadable:
        assert "cannot be loaded" in store.failure(cell.id).error
        assert "Traceback" in store.failure(cell.id).traceback


def test_nothing_can_be_run_if_the_only_model_cannot_be_loaded(store, unloadable):
    with pytest.raises(EvalError, match="cannot be loaded"):
        Runner(store).run(unloadable)


def test_mostly_empty_answers_are_a_failure_and_not_a_bad_score(runner, store, make_cell, monkeypatch):
    cell = make_cell("random", keep=0.5)
    texts = iter(["", " ", "red", "", "\n", "blue", "", "yes"])
    monkeypatch.setattr("vtoken.eval.model.loaded.cut_at", lambda text, until: next(texts))
    assert runner.run([cell]).failed == [cell]
    assert "5 of 8 answers are empty, more than empty_limit=0.5 allows" in store.failure(cell.id).error
    assert store.result(cell.id) is None

    runner.empty_limit = 0.625  # the answers are there already
    assert runner.run([cell]).finished == [cell]
    assert store.result(cell.id).empty_answers == 5


def test_a_runner_whose_lock_was_taken_leaves_the_cell_to_the_other(runner, store, make_cell, monkeypatch):
    def taken(lock):
        raise LockLostError("taken")

    monkeypatch.setattr(CellLock, "check", taken)
    cell = make_cell("random", keep=0.5)
    assert runner.attempt(cell).status is Status.BUSY
    assert (store.result(cell.id), store.failure(cell.id)) == (None, None)


def test_ranks_of_a_launcher_are_refused(runner, store, make_cell, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # lmms-eval would give each rank a part of the documents
    cell = make_cell()
    runner.run([cell])
    assert "without torchrun" in store.failure(cell.id).error
