# SPDX-License-Identifier: Apache-2.0
"""``vtoken sweep``: lists its cells, runs them, resumes, and goes on where a model is broken."""

import json
import re
import shutil

import pytest
import yaml
from taskfolder import write_task_folder
from typer.testing import CliRunner

from vtoken.cli import app
from vtoken.eval.running.runner import Runner


@pytest.fixture
def sweep(checkpoint, private_cache, tmp_path, monkeypatch):
    """``sweep("--dry-run", models=[...])``: writes a file, runs it from another folder into ``out``."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*arguments, out="out", **changes):
        data = {"models": [str(checkpoint)], "tasks": ["mini_count"], "reducers": ["random"], "keep": [16]}
        data |= {"batch_size": 4, "limit": 4, "out": out, **changes}
        (tmp_path / "my.yaml").write_text(yaml.safe_dump(data))
        return CliRunner().invoke(app, ["sweep", str(tmp_path / "my.yaml"), *arguments])

    return run


@pytest.fixture
def no_model(monkeypatch):
    """From here on, touching a model is an error."""

    def forbidden(self, cell):
        raise AssertionError("a model was loaded")

    return lambda: monkeypatch.setattr(Runner, "model", forbidden)


def test_runs_and_resumes_on_the_embedded_model(sweep, no_model, tmp_path):
    grid = {"reducer": "idpruner", "grid": {"lam": [0.3, 0.5]}}
    chain = {"reducer": "chain", "stages": [{"reducer": "random", "keep": 0.5}, {"reducer": "fastv", "keep": 0.1}]}
    given = {"models": ["mini-llava"], "reducers": ["random", grid, chain], "keep": [16, 0.5]}
    first = sweep("--limit", "8", **given)
    assert first.exit_code == 0, first.output
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [(row["reducer"], row["keep"], row["documents"]) for row in rows] == [
        ("unpruned", None, 8),
        ("random", 16, 8),
        ("random", 0.5, 8),
        ("idpruner (lam=0.3)", 16, 8),
        ("idpruner (lam=0.3)", 0.5, 8),
        ("idpruner", 16, 8),
        ("idpruner", 0.5, 8),
        ("random 0.5 > fastv 0.1", None, 8),
    ]
    assert [row["visual_kept"] for row in rows[:3]] == [144, 16, 72]
    no_model()
    again = sweep("--limit", "8", **given)
    assert again.exit_code == 0, again.output
    assert "8 of 8 cells are there already" in again.stderr
    assert again.stdout == first.stdout


def test_a_dry_run_lists_cells_and_touches_nothing(sweep, no_model, tmp_path):
    no_model()
    done = sweep("--dry-run", seeds=[0, 7])
    assert done.exit_code == 0, done.output
    lines = [re.split(r"  +", line.strip())[1:] for line in done.stdout.splitlines() if "tiny-llava" in line]
    assert lines == [
        ["mini_count", "unpruned", "any", "to do"],
        ["mini_count", "random", "16", "0", "to do"],
        ["mini_count", "random", "16", "7", "to do"],
    ]
    assert "3 cells: 0 finished, 0 failed, 3 to do" in done.stdout
    assert "About" not in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_dry_run_knows_what_is_finished_and_what_the_rest_may_take(sweep, tmp_path):
    assert sweep(tasks=["mini_count"]).exit_code == 0
    results = [json.loads(path.read_text())["result"] for path in (tmp_path / "out").glob("cells/*/result.json")]
    done = sweep("--dry-run", reducers=["random", "uniform"], tasks=["mini_count", "mini_attr"])
    assert "6 cells: 2 finished, 0 failed, 4 to do" in done.stdout
    minutes, seconds = map(int, re.search(r"About 0:(\d+):(\d+) on one worker\.", done.stdout).groups())
    expected = 4 * sum(result["seconds"] for result in results) / len(results)
    assert 60 * minutes + seconds == pytest.approx(expected, abs=1)


def test_a_model_of_the_hub_needs_no_network_to_be_listed(sweep, checkpoint):
    done = sweep("--dry-run", models=["someone/not-in-the-cache", str(checkpoint)])
    assert done.exit_code == 0, done.output
    assert len(re.findall(r"someone/not-in-the-cache .* to do, not resolved", done.stdout)) == 2
    assert "someone/not-in-the-cache is not resolved: its config is not in the local cache" in done.stderr


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors"])
def test_a_broken_model_fails_its_cells_and_no_others(sweep, checkpoint, tmp_path, damage):
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    (broken / damage).write_bytes(b"{")
    done = sweep(models=["broken", str(checkpoint)])
    assert done.exit_code == 1, done.output
    assert re.search(r"broken +unpruned +failed", done.stdout)
    assert re.search(r"tiny-llava +random +16 +\d", done.stdout)
    failures = [json.loads(path.read_text())["failure"] for path in (tmp_path / "out").glob("cells/*/failure.json")]
    assert len(failures) == 2
    assert all("Traceback" in failure["traceback"] for failure in failures)
    (broken / damage).write_bytes((checkpoint / damage).read_bytes())
    repaired = sweep(models=["broken", str(checkpoint)])
    assert repaired.exit_code == 0, repaired.output
    assert "failed" not in repaired.stdout
    if damage == "config.json":  # damaged weights are other weights, and other cells
        assert not list((tmp_path / "out").glob("cells/*/failure.json"))


def test_a_task_folder_of_the_user(sweep, tmp_path):
    write_task_folder(tmp_path / "tasks", "colors", "more_colors")
    done = sweep(models=["mini-llava"], tasks=[{"folder": "tasks", "tasks": ["colors"], "limit": 3}])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [(row["task"], row["reducer"], row["documents"]) for row in rows] == [
        ("colors", "unpruned", 3),
        ("colors", "random", 3),
    ]


def test_fresh_starts_over(sweep, tmp_path):
    sweep()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("cells/*/result.json")}
    done = sweep("--fresh")
    assert "already" not in done.stderr
    after = {path: path.stat().st_mtime_ns for path in before}
    assert all(after[path] > before[path] for path in before)


def test_options_win_over_the_file(sweep, tmp_path):
    tasks = [{"task": "mini_count", "limit": 3}]
    assert sweep("--limit", "2", "--out", str(tmp_path / "other"), tasks=tasks).exit_code == 0
    rows = json.loads((tmp_path / "other" / "results.json").read_text())["rows"]
    assert {row["documents"] for row in rows} == {2}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "changes", "sentence"),
    [
        (["--executor", "lokal"], {}, "Unknown executor 'lokal': did you mean 'local'?"),
        (["--address", "auto"], {}, "Unknown local executor option 'address'"),
        (["--limit", "0"], {}, "limit=0 is not possible"),
        ([], {"keep": [3.5]}, "my.yaml: keep[0]: keep=3.5 is not a ratio"),
        ([], {"tasks": ["minni"]}, "my.yaml: tasks[0]: Unknown task 'minni'"),
        ([], {"models": ["./gone"]}, "my.yaml: models[0]: Unknown model"),
    ],
)
def test_wrong_input_is_a_sentence(sweep, arguments, changes, sentence):
    done = sweep(*arguments, **changes)
    assert done.exit_code == 2, done.output
    assert sentence in done.stderr
    assert done.stderr.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("file", "sentence"),
    [("llava1.5", "Unknown sweep 'llava1.5': did you mean 'llava15'?"), ("./none.yaml", "'none.yaml' cannot be read")],
)
def test_a_sweep_that_is_not_there(file, sentence):
    done = CliRunner().invoke(app, ["sweep", file])
    assert (done.exit_code, done.stdout) == (2, "")
    assert sentence in done.stderr


def test_a_shipped_sweep_by_name(private_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["sweep", "quick", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "5 cells: 0 finished, 0 failed, 5 to do; results folder vtoken-results/quick" in done.stdout
    assert list(tmp_path.iterdir()) == []
