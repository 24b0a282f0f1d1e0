# SPDX-License-Identifier: Apache-2.0
"""``vtoken compare A B``: finished results as one table, without running anything."""

import csv
import io
import re

import pytest
from finished import save_run, save_table
from typer.testing import CliRunner

from vtoken.cli import app
from vtoken.eval.store.results import Store


@pytest.fixture
def results(tmp_path, make_cell, monkeypatch):
    """Folders A and B: B has a better fopru, on other documents for a part, and a reducer more."""
    monkeypatch.chdir(tmp_path)
    for name, rates, first in (("A", {"random": 0.4, "fopru": 0.6}, 0), ("B", {"fopru": 0.75, "uniform": 0.5}, 40)):
        store, cells = Store(tmp_path / name), [make_cell()]
        save_run(store, cells[0], 0.8, first=first)
        for reducer, rate in rates.items():
            cells.append(make_cell(reducer, keep=0.25))
            save_run(store, cells[-1], rate, first=first)
        if name == "A":
            save_table(store, cells)
    return tmp_path


def compare(*arguments, columns="160"):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)], env={"COLUMNS": columns})


def as_rows(*arguments):
    done = compare(*arguments, "--format", "csv")
    assert done.exit_code == 0, done.output
    return {(row["source"], row["reducer"]): row for row in csv.DictReader(io.StringIO(done.stdout))}


def test_the_first_folder_is_the_reference(results):
    rows = as_rows("A", "B")
    assert list(rows) == [
        *(("A", name) for name in ("unpruned", "random", "fopru")),
        *(("B", name) for name in ("unpruned", "fopru", "uniform")),
    ]
    fopru = rows["B", "fopru"]
    assert (fopru["reference"], fopru["reference_documents"], fopru["documents"]) == ("A: fopru 0.25", "160", "200")
    assert int(fopru["reference_won"]) > 10
    assert fopru["reference_lost"] == "0"
    assert float(fopru["reference_adjusted"]) >= float(fopru["reference_p_value"])
    assert rows["B", "uniform"]["reference"] == "A: unpruned", "A has no such cell"
    assert rows["A", "fopru"]["reference"] == ""
    assert float(rows["A", "fopru"]["random_difference"]) > 0


def test_another_baseline(results):
    rows = as_rows("A", "B", "--baseline", "B")
    assert rows["A", "fopru"]["reference"] == "B: fopru 0.25"
    assert rows["A", "fopru"]["reference_won"] == "0"
    assert rows["B", "fopru"]["reference"] == ""


def test_one_folder_is_compared_within(results):
    done = compare("A")
    assert done.exit_code == 0, done.output
    assert re.search(r"fopru +0\.25 .*-\d+\.\d\*", done.stdout)
    assert "vs unpruned" in done.stdout


def test_cells_by_id_and_by_folder(results):
    ids = {row["reducer"]: row["cell"] for row in as_rows("A").values()}
    found = as_rows(f"A/cells/{ids['random']}", f"A/cells/{ids['fopru']}")
    assert found[ids["fopru"], "fopru"]["reference"] == f"{ids['random']}: random 0.25"
    (results / "A").rename(results / "vtoken-results")
    assert as_rows(ids["random"], ids["fopru"]) == found


def test_only_the_cells_of_the_last_table_count(results, make_cell):
    save_run(Store(results / "A"), make_cell("uniform", keep=0.9), 0.7)
    assert len(as_rows("A")) == 3


def test_says_on_how_many_questions_runs_are_compared(results):
    done = compare("A", "B")
    assert "B fopru 0.25 on mini is compared on 160 of its 200 questions." in done.stdout


def test_markdown_and_latex_go_to_a_file(results):
    assert compare("A", "B", "--format", "markdown", "--out", "t/table.md").exit_code == 0
    lines = (results / "t" / "table.md").read_text().splitlines()
    assert len(lines) == 8
    assert lines[0].startswith("| source | reducer | keep | accuracy")
    done = compare("A", "B", "--format", "latex", "--out", "table.tex")
    assert done.stdout == "Written: table.tex\n"
    assert r"\begin{tabular}" in (results / "table.tex").read_text()


def test_fits_80_columns(results):
    from rich.console import Console

    from vtoken.cli.cells import build_table
    from vtoken.cli.finished import read_rows

    rows, _ = read_rows(["A", "B"], None, results)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(build_table(rows, console))
    text = console.export_text()
    assert "lost/won" in text
    assert "…" not in text
    assert all(len(line) <= 80 for line in text.splitlines())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["A", "C"], "There is no folder 'C'"),
        (["A", "empty"], "Nothing is finished in 'empty'"),
        (["A", "B", "-r", "todre"], "--reducers says what to run"),
        (["A", "--fresh"], "--fresh says what to run"),
        (["A", "B", "--out", "A/results.json/x"], "cannot be written"),
        (["A", "other"], "'A' has results of mini, 'other' of mini_count: they have no task in common."),
        (["--baseline", "A"], "--baseline is for finished results"),
    ],
)
def test_wrong_input_is_a_sentence(results, make_cell, arguments, sentence):
    (results / "empty").mkdir()
    save_run(Store(results / "other"), make_cell(task="mini_count"), 0.5, count=8)
    done = compare(*arguments)
    assert done.exit_code == 2, done.output
    assert sentence in done.stderr
    assert done.stderr.strip().count("\n") == 0
