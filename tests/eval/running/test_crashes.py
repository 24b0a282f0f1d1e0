# SPDX-License-Identifier: Apache-2.0
"""Whatever kills a sweep, and whoever runs beside it, it ends with the results of an undisturbed one."""

import concurrent.futures
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import crashing
import pytest
from typer.testing import CliRunner

from vtoken.cli import app
from vtoken.eval.running.runner import Runner
from vtoken.eval.store.record import Failure
from vtoken.eval.store.results import Store

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and forks")


@pytest.fixture
def cells(make_cell):
    points = [(None, {}), ("random", {"keep": 0.5}), ("todre", {"keep": 0.1}), ("fastv", {"keep": 0.25})]
    return [make_cell(name, limit=12, batch_size=3, model="mini-llava", **params) for name, params in points]


@pytest.fixture(scope="module")
def apart():
    """Calls functions of `crashing` in another process, whose imports are done once."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=600)


@pytest.fixture
def undisturbed(cells, tmp_path):
    """Metrics and samples of every cell after one run without incident."""
    return outcome(cells, Runner(Store(tmp_path / "undisturbed")))


def outcome(cells, runner):
    runner.run(cells)
    return contents(cells, runner.store)


def contents(cells, store):
    results = [store.result(cell.id) for cell in cells]
    return [(result.metrics, store.samples(cell.id)) for cell, result in zip(cells, results, strict=True)]


def test_killed_twenty_times(cells, undisturbed, apart, tmp_path):
    killed, partial, _ = apart(crashing.kill_often, cells, tmp_path / "killed", 20, 0)
    assert killed == 20
    assert partial >= 10  # the kills did hit cells in their middle
    store = Store(tmp_path / "killed")
    assert contents(cells, store) == undisturbed
    for cell in cells:
        assert_nothing_is_left(cell, store)


def test_killed_before_every_change_of_a_file(cells, undisturbed, apart, tmp_path):
    kills = apart(crashing.kill_at_every_change, cells[1], tmp_path / "killed")
    assert kills >= 4  # samples, result, answers, lock
    for moment in range(1, kills + 2):
        store = Store(tmp_path / "killed" / str(moment))
        assert contents(cells[1:2], store) == undisturbed[1:2]
        assert_nothing_is_left(cells[1], store)


def assert_nothing_is_left(cell, store):
    assert sorted(path.name for path in store.path(cell.id, "").iterdir()) == ["result.json", "samples.jsonl"]
    assert not list((store.root / "locks").iterdir())


def test_two_runners_share_the_cells_and_a_dead_one_is_inherited(cells, undisturbed, apart, tmp_path):
    first, killed, third = apart(crashing.compete, cells, tmp_path / "shared")
    assert first
    assert killed
    assert sorted(first + third) == sorted(cell.id for cell in cells)  # none twice
    assert set(killed) <= {*first, *third}
    assert contents(cells, Store(tmp_path / "shared")) == undisturbed


def test_a_cell_that_another_runner_failed_is_not_tried_again(make_cell, tmp_path, monkeypatch):
    cell, store = make_cell(), Store(tmp_path)
    failure = Failure(error="shapes do not match", at="now")
    lock = store.lock(cell.id)

    def other_runner_fails(seconds):
        store.save_failure(cell.record(failure=failure))
        holder.__exit__(None, None, None)

    holder = lock.attempt()
    assert holder.__enter__()
    monkeypatch.setattr("vtoken.eval.running.runner.time.sleep", other_runner_fails)
    assert Runner(store).run([cell]).failed == [cell]
    assert store.failure(cell.id) == failure


def test_a_killed_command_goes_on(private_cache, tmp_path):
    options = ["compare", "-r", "random", "-k", "0.5,0.1", "--limit", "24", "--batch-size", "4"]
    program = "from vtoken.cli import main; main()"
    killed = tmp_path / "killed"
    running = subprocess.Popen([sys.executable, "-c", program, *options, "--out", str(killed)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not list(killed.glob("cells/*/result.json")) or not list(killed.glob("cells/*/answers.jsonl")):
        assert running.poll() is None, running.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    assert len(list(killed.glob("cells/*/result.json"))) < 3

    for folder in (killed, tmp_path / "whole"):
        done = CliRunner().invoke(app, [*options, "--out", str(folder)])
        assert done.exit_code == 0, done.output
    rows, whole = (json.loads((folder / "results.json").read_text())["rows"] for folder in (killed, tmp_path / "whole"))
    costs = ("prefill_ms", "speedup", "speedup_low", "speedup_high")
    assert [{**row, **dict.fromkeys(costs)} for row in rows] == [{**row, **dict.fromkeys(costs)} for row in whole]
