# SPDX-License-Identifier: Apache-2.0
"""Executors: checked options, the same results whoever runs, and no result lost with a process."""

import dataclasses
import importlib.util
import multiprocessing
import os
import signal
from types import SimpleNamespace

import pytest

from vtoken.eval.errors import EvalError, MissingExtraError
from vtoken.eval.executors import get_executor, names, options
from vtoken.eval.executors.team import share
from vtoken.eval.model.loaded import LoadedModel
from vtoken.eval.model.loading import ModelSpec
from vtoken.eval.running.listener import Listener
from vtoken.eval.store.results import Store


class Log(Listener):
    """Remembers what it is told."""

    def __init__(self):
        self.begun, self.counts, self.troubles, self.ended = [], {}, [], []

    def started(self, cell):
        self.begun.append(cell)
        self.counts[cell.id] = 0

    def answered(self, cell, count):
        self.counts[cell.id] += count

    def finished(self, cell, result):
        self.ended.append(cell)

    def failed(self, cell, failure):
        self.ended.append(cell)

    def trouble(self, text):
        self.troubles.append(text)


@pytest.fixture
def cells(make_cell):
    points = [(None, {}), ("random", {"keep": 0.5}), ("todre", {"keep": 0.1})]
    return [make_cell(name, limit=21, batch_size=3, model="mini-llava", **params) for name, params in points]


@pytest.fixture
def expected(cells, tmp_path):
    """Metrics and samples by the local executor."""
    store = Store(tmp_path / "local")
    get_executor("local").run(cells, store, Listener())
    return contents(cells, store)


def contents(cells, store):
    return [(store.result(cell.id).metrics, store.samples(cell.id)) for cell in cells]


def test_names_and_options():
    assert names() == ["local", "accelerate", "ray"]
    assert options("local") == ["empty_limit", "skip_broken"]
    assert {"address", "workers", "gpus_per_worker", "cpus_per_worker", "retries"} < set(options("ray"))


@pytest.mark.parametrize(
    ("name", "given", "sentence"),
    [
        ("rai", {}, "Unknown executor 'rai': did you mean 'ray'?"),
        ("ray", {"worker": 2}, "Unknown ray executor option 'worker': did you mean 'workers'?"),
        ("local", {"empty_limit": 2}, "empty_limit=2 is not possible"),
        ("local", {"empty_limit": "no"}, "empty_limit='no' is not possible"),
        ("local", {"skip_broken": -1}, "skip_broken=-1 is not possible"),
        ("accelerate", {"processes": 0}, "processes=0 is not possible"),
        ("ray", {"workers": 1.5}, "workers=1.5 is not possible"),
        ("ray", {"retries": -1}, "retries=-1 is not possible"),
        ("ray", {"address": "ray://head:10001"}, "address='ray://head:10001' is not possible"),
        ("ray", {"gpus_per_worker": 1.5}, "gpus_per_worker=1.5 is not possible"),
    ],
)
def test_wrong_input_is_a_sentence(name, given, sentence):
    with pytest.raises(EvalError) as caught:
        get_executor(name, **given)
    assert sentence in str(caught.value)


def test_ray_is_an_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"vtoken\[ray\]"):
        get_executor("ray")


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_are_whole_batches_that_add_up(size):
    questions = [SimpleNamespace(kind="ab"[i % 2], number=i) for i in range(9)]
    shares = [[found.number for found in share(questions, 2, rank, size)] for rank in range(size)]
    assert sorted(number for part in shares for number in part) == list(range(9))
    assert shares[0][:2] == [0, 2]
    assert max(map(len, shares)) - min(map(len, shares)) <= 3


def test_data_parallel_refuses_a_model_spread_over_devices(make_cell, tmp_path):
    cell = dataclasses.replace(make_cell(), model=ModelSpec("mini-llava", device_map="auto"))
    with pytest.raises(EvalError, match="device_map='auto'"):
        get_executor("accelerate", processes=2).run([cell], Store(tmp_path), Listener())


def test_data_parallel_gives_the_result_of_one_process(cells, expected, tmp_path, monkeypatch):
    here, generate = [], LoadedModel.generate

    def counted(model, conversations, *rest):
        here.append(len(conversations))
        return generate(model, conversations, *rest)

    class Killer(Log):
        """Kills the second process in the last cell."""

        def answered(self, cell, count):
            super().answered(cell, count)
            if cell == cells[-1]:
                for process in multiprocessing.active_children():
                    os.kill(process.pid, signal.SIGKILL)

    monkeypatch.setattr(LoadedModel, "generate", counted)
    log, store = Killer(), Store(tmp_path / "parallel")
    outcome = get_executor("accelerate", processes=2).run(cells, store, log)
    assert outcome.finished == cells
    assert contents(cells, store) == expected
    assert log.counts[cells[0].id] == log.counts[cells[1].id] == 21
    # batches 0, 2, 4 and 6 of 7 of each cell, and in the last one what the killed process owed
    assert sum(here[:8]) == 2 * 12
    assert here[8:12] == [3, 3, 3, 3]
    assert log.troubles == [] or "Process 2 of 2 did not answer its share" in log.troubles[0]
    assert [path.name for path in store.path(cells[0].id, "").glob("answers*")] == []


def test_ray_workers_pick_cells_of_their_model():
    pytest.importorskip("ray")
    from vtoken.eval.executors.ray_sweep import pick

    a, b, c = (ModelSpec(name) for name in "abc")
    queue = [SimpleNamespace(model=model, n=n) for n, model in enumerate([a, a, b, c, c])]
    assert pick(queue, b, [a, b]).n == 2  # its own
    assert pick(queue, None, [a, b, None]).n == 3  # one that nobody has loaded
    assert pick(queue, None, [a, b, c, None]).n == 0  # one with most cells left
    assert pick([], a, [a]) is None


def test_ray_survives_a_killed_worker(cells, expected, make_cell, checkpoint, tmp_path):
    pytest.importorskip("ray")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    raising = make_cell("fastv", layer=99, keep=0.5, model="mini-llava")
    unloadable = make_cell(model=damaged)
    store = Store(tmp_path / "ray")

    class Killer(Log):
        """Kills the worker of the second cell in its middle, once."""

        victim = None

        def answered(self, cell, count):
            super().answered(cell, count)
            if cell == cells[1] and self.victim is None:
                self.victim = store.lock(cell.id).holder
                os.kill(self.victim, signal.SIGKILL)

    log = Killer()
    executor = get_executor("ray", workers=2, retries=1)
    outcome = executor.run([*cells, raising, unloadable], store, log)
    assert {cell.id for cell in outcome.finished} == {cell.id for cell in cells}
    assert {cell.id for cell in outcome.failed} == {raising.id, unloadable.id}
    assert contents(cells, store) == expected
    assert log.victim not in (None, os.getpid())
    assert log.begun.count(cells[1]) == 2
    assert log.begun.count(raising) == 2
    assert len(log.ended) == len(cells) + 2
    assert {log.counts[cell.id] for cell in cells} == {21}
    assert any("worker was lost" in text for text in log.troubles)
    assert "Traceback" in store.failure(raising.id).traceback
    assert "cannot be loaded" in store.failure(unloadable.id).error

    again = executor.run(cells, store, log)
    assert (again.skipped, again.finished) == (cells, [])
