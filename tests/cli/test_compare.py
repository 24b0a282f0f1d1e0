# SPDX-License-Identifier: Apache-2.0
"""``vtoken compare``: one table, three files, and no work done twice."""

import io
import json
import re
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import vtoken
from vtoken.cli import app
from vtoken.eval.running.runner import Runner

TINY = ["--limit", "8", "--batch-size", "4", "-k", "0.25"]


@pytest.fixture
def compare(checkpoint, private_cache, tmp_path):
    """``compare("-r", "random")``: on the tiny checkpoint, into one folder."""

    def run(*arguments, model=checkpoint):
        command = ["compare", "-m", str(model), "--out", str(tmp_path / "out"), *TINY, *arguments]
        return CliRunner().invoke(app, command)

    return run


@pytest.fixture
def no_model(monkeypatch):
    """From here on, touching a model is an error."""

    def forbidden(self, cell):
        raise AssertionError("a model was loaded")

    return lambda: monkeypatch.setattr(Runner, "model", forbidden)


def test_ends_in_a_table_and_writes_files(compare, tmp_path):
    done = compare("-r", "random,{reducer: fopru, strategy: row}")
    assert done.exit_code == 0, done.output
    for text in ("unpruned", "random", "fopru (row)", "36.0", "144.0", "1.00x", "8 questions", "KiB"):
        assert text in done.stdout
    assert "2/3 random keep 0.25 on mini" in done.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"cells", "locks", "report.html", "results.json", "results.csv"}
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["reducer"] for row in rows] == ["unpruned", "random", "fopru (row)"]
    assert all(len(row["kinds"]) == 8 and row["prefill_ms"] > 0 for row in rows)


def test_again_recomputes_nothing(compare, no_model):
    first = compare("-r", "random")
    no_model()
    again = compare("-r", "random")
    assert again.exit_code == 0
    assert "2 of 2 cells are there already; --fresh starts over" in again.stderr
    assert again.stdout == first.stdout


def test_more_reducers_add_only_what_is_new(compare):
    compare("-r", "random")
    more = compare("-r", "random,uniform", "-k", "0.25,0.5")
    assert "2 of 5 cells are there already" in more.stderr
    assert "3/3" in more.stderr


def test_fresh_starts_over_but_keeps_other_cells(compare, tmp_path):
    compare("-r", "random,uniform")
    cells = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").glob("*/result.json")}
    done = compare("-r", "random", "--fresh")
    assert "already" not in done.stderr
    assert "2/2" in done.stderr
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 3
    assert len(cells) == 1 or done.exit_code == 0


def test_a_failing_cell_is_marked_and_fails_the_command(compare, monkeypatch):
    def crash(self, ctx, budget):
        raise RuntimeError("shapes [1, 2] do not match")

    monkeypatch.setattr(vtoken.Uniform, "select", crash)
    done = compare("-r", "random,uniform")
    assert done.exit_code == 1
    assert "uniform 0.25 on mini failed: documents 0 to 3 of task 'mini': shapes [1, 2] do not match\n" in done.stdout
    assert re.search(r"uniform +0.25 +failed", done.stdout)
    assert re.search(r"random +0.25 +0\.0", done.stdout)
    monkeypatch.undo()


def test_several_tasks_are_told_apart(compare):
    done = compare("-r", "random", "-t", "mini_attr,mini_count", "--limit", "4")
    assert done.exit_code == 0
    assert re.search(r"mini_attr +random", done.stdout)
    assert re.search(r"mini_count +random", done.stdout)


def test_a_preset_file_and_a_token_count(compare, tmp_path):
    (tmp_path / "mine.yaml").write_text("reducer: todre\nvariant: k_center\n")
    done = compare("-r", str(tmp_path / "mine.yaml"), "-k", "16")
    assert done.exit_code == 0, done.output
    assert re.search(r"todre \(k_center\) +16 .* 16\.0", done.stdout)


def test_quick_asks_few_questions(checkpoint, private_cache, tmp_path):
    command = ["compare", "--quick", "-m", str(checkpoint), "--out", str(tmp_path), "--limit", "8"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["reducer"] for row in rows] == ["unpruned", "random", "fopru", "todre", "idpruner"]


def test_defaults_of_the_embedded_model_do_not_apply_to_others(monkeypatch):
    from vtoken.cli.compare import _defaults
    from vtoken.eval.sweeps.sweep import Sweep

    monkeypatch.setattr("vtoken.mini.names", lambda: ["mini-llava"])
    common = {"reducers": ["random"], "keep": [0.5]}
    none = {"limit": None, "batch_size": None}
    embedded = Sweep(models=["mini-llava"], tasks=["mini", "mini_read"], **common)
    real = Sweep(models=["llava-hf/llava-1.5-7b-hf"], tasks=["mini", "gqa_lite"], **common)
    assert _defaults(embedded, none) == {}
    assert _defaults(real, none) == {"limit": None, "batch_size": 1}
    assert _defaults(real, {"limit": 5, "batch_size": 2}) == {}


@pytest.mark.parametrize(("width", "header"), [(80, "of all"), (160, "accuracy % [95 % CI]")])
def test_the_table_fits_the_terminal(width, header):
    from rich.console import Console

    from vtoken.cli.cells import build_table
    from vtoken.eval.comparison.statistics import Estimate, Paired
    from vtoken.eval.comparison.summary import Row

    place = {"cell": "c", "model": "mini-llava", "task": "mini", "documents": 320, "accuracy": Estimate(1.0, 0.95, 1.0)}
    counts = {"visual_tokens": 144, "visual_kept": 144.0, "visual_per_layer": 120.5}
    costs = {"prefill_ms": 140.1, "speedup": 12.34, "kv_bytes": 940_000}
    versus = Paired(Estimate(-0.101, -0.2, -0.05), 0.0004, 40, 8)
    row = Row(**place, **counts, **costs, reducer="todre (k_center)", keep=0.05, versus_unpruned=versus, retained=1.0)
    noisy = replace(row, speedup=9.77, speedup_low=0.71, speedup_high=12.6)
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(build_table([row, noisy], console))
    text = console.export_text()
    assert header in text
    assert "…" not in text
    assert ("noisy 0.71-13x" if width > 80 else " noisy ") in text
    assert "9.8x" not in text
    assert "9.77x" not in text
    assert all(len(line) <= width for line in text.splitlines())
