# SPDX-License-Identifier: Apache-2.0
"""``vtoken rerun``: any cell again from its record alone; what differs is said, and other results fail the command."""

import json
import shutil

import pytest
import yaml
from taskfolder import write_task_folder
from typer.testing import CliRunner

import vtoken
from vtoken.cli import app
from vtoken.eval.harness.tasksource import load_task
from vtoken.eval.store.record import RESULT, SAMPLES


def invoke(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="module")
def finished(checkpoint, private_cache, tmp_path_factory):
    """A folder with a user's tasks and, in ``out``, finished cells of them in bfloat16."""
    folder = tmp_path_factory.mktemp("finished")
    write_task_folder(folder / "tasks", "colors")
    model = {"pretrained": str(checkpoint), "dtype": "bfloat16", "device": "cpu", "attn_implementation": "eager"}
    data = {"models": [model], "tasks": ["./tasks"], "reducers": ["random"], "keep": [0.5], "seeds": [3]}
    (folder / "s.yaml").write_text(yaml.safe_dump({**data, "limit": 3, "batch_size": 2, "out": "out"}))
    done = invoke("sweep", folder / "s.yaml")
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def cells(finished, tmp_path):
    """Copies of the cells' folders by label; their tasks are where they were."""
    shutil.copytree(finished / "out", tmp_path / "out")
    return {json.loads(path.read_text())["label"]: path.parent for path in (tmp_path / "out").rglob(RESULT)}


def test_a_cell_gives_again_what_is_recorded(cells, tmp_path):
    for label, folder in cells.items():
        done = invoke("rerun", folder)
        assert done.exit_code == 0, done.output
        assert f"{label} 0.5 on colors" in done.stdout or label == "unpruned"
        assert "3 documents; scores, answers and token counts as recorded." in done.stdout
        assert len(done.stdout.splitlines()) == 1
    by_id = invoke("rerun", folder.name, "--results", tmp_path, "--out", tmp_path / "again")
    assert by_id.exit_code == 0
    assert (tmp_path / "again" / "cells" / folder.name / SAMPLES).read_text() == (folder / SAMPLES).read_text()


def test_results_that_differ_fail_and_are_named(cells, monkeypatch):
    folder = cells["random"]
    samples = [json.loads(line) for line in (folder / SAMPLES).read_text().splitlines()]
    samples[1]["answer"], samples[2]["score"] = "never said", 0.5
    samples[2]["tokens"]["visual_kept"] = 99
    (folder / SAMPLES).write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    record = json.loads((folder / RESULT).read_text())
    record["made_with"]["torch"] = "1.0"
    record["result"]["metrics"]["exact_match,none"] = 0.25
    (folder / RESULT).write_text(json.dumps(record))
    done = invoke("rerun", folder)
    assert done.exit_code == 1, done.output
    assert "results differ" in done.stdout
    for part in (
        "1 of 3 answers, the first of document 1: 'never said' then",
        "1 of 3 scores, the first of document 2: 0.5 then",
        "1 of 3 token counts, the first of document 2",
        "metric exact_match,none: 0.25 then",
        "torch: 1.0 then",
    ):
        assert part in done.stdout


def test_another_version_alone_is_named_and_does_not_fail(cells):
    folder = cells["unpruned"]
    record = json.loads((folder / RESULT).read_text())
    record["cell"]["versions"]["vtoken code"] = record["made_with"]["vtoken code"] = "0" * 16
    (folder / RESULT).write_text(json.dumps(record))
    done = invoke("rerun", folder)
    assert done.exit_code == 0, done.output
    assert "vtoken code: 0000000000000000 then" in done.stdout


@pytest.fixture
def edited(finished):
    """The questions are phrased otherwise meanwhile."""
    questions = finished / "tasks" / "questions.json"
    before = questions.read_text()
    questions.write_text(before.replace("what color", "which color"))
    load_task.cache_clear()  # a new process would read it anew, too
    yield
    questions.write_text(before)
    load_task.cache_clear()


def test_a_task_that_was_edited_is_named(cells, edited):
    done = invoke("rerun", cells["random"])
    assert done.exit_code == 1, done.output
    assert "3 of 3 prompts or pictures, the first of document 0" in done.stdout
    assert "task fingerprint" in done.stdout


def test_a_cell_that_failed_is_run_again_too(cells, checkpoint, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(vtoken.Uniform, "select", lambda self, ctx, budget: 1 / 0)
        invoke("compare", "-m", checkpoint, "-r", "uniform", "-k", "0.5", "--limit", "2", "--out", tmp_path / "bad")
    (failed,) = [path.parent for path in (tmp_path / "bad").rglob("failure.json")]
    done = invoke("rerun", failed)
    assert done.exit_code == 1
    assert "error: document 0 of task 'mini': division by zero then, none now" in done.stdout


def test_what_cannot_be_run_again_is_a_sentence(cells, finished, tmp_path):
    gone = invoke("rerun", "0123456789abcdef", "--results", tmp_path)
    assert (gone.exit_code, "no finished or failed cell" in gone.stderr) == (2, True)
    shutil.move(finished / "tasks", finished / "elsewhere")
    moved = invoke("rerun", cells["random"])
    shutil.move(finished / "elsewhere", finished / "tasks")
    assert (moved.exit_code, "There is no task folder" in moved.stderr) == (2, True)
