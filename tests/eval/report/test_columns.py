# SPDX-License-Identifier: Apache-2.0
"""One list of columns: what is added to it is everywhere, and what is in it is explained where it is shown."""

import csv
import dataclasses
import io
import json

import pytest
from rich.console import Console

from vtoken.cli.cells import build_table
from vtoken.cli.finished import Format, _text
from vtoken.eval.comparison.statistics import Estimate, Paired
from vtoken.eval.comparison.summary import Row
from vtoken.eval.report import columns
from vtoken.eval.report.columns import Column, Narrow, legend, shown
from vtoken.eval.report.page import render_html, write_reports

VERSUS = Paired(Estimate(-0.1, -0.2, 0.0), 0.01, 3, 1, Estimate(0.9, 0.8, 1.0), 8, 4, 0.02)
PLACE = {"cell": "c", "model": "m", "task": "t", "documents": 8, "accuracy": Estimate(0.5, 0.4, 0.6)}
ROWS = [
    Row(**PLACE, reducer="unpruned", keep=None, retained=1.0, visual_kept=144.0, prefill_ms=20.0),
    Row(**PLACE, reducer="fopru", keep=0.25, versus_unpruned=VERSUS, versus_random=VERSUS, retained=0.9),
]


def titles(rows, narrow=False):
    return [column.title for column in shown(rows, narrow)]


def test_every_field_of_a_row_has_one_column():
    fields = [field.name for field in dataclasses.fields(Row)]
    keys = [column.key for column in columns.COLUMNS]
    assert len(set(keys)) == len(keys)
    assert set(fields) <= set(keys)


@pytest.fixture
def one_more(monkeypatch):
    """A column beside those that are there: half of the keep ratio, shown where a ratio is known."""
    column = Column(
        "seed",
        "half <of> keep",
        lambda row: "" if row.keep is None else f"{row.keep / 2:g}",
        Narrow("half"),
        "half: of it.",
        when=lambda rows: any(row.keep for row in rows),
        is_name=True,
    )
    kept = tuple(other for other in columns.COLUMNS if other.key != "seed")
    monkeypatch.setattr(columns, "COLUMNS", (*kept, column))


def test_one_entry_makes_a_column_everywhere(one_more, tmp_path):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(build_table(ROWS, console))
    text = console.export_text()
    assert "half <of> keep" in text
    assert "0.125" in text
    assert titles(ROWS, narrow=True)[-1] == "half"
    assert "| half <of> keep |" in _text(ROWS, Format.MARKDOWN)
    assert "0.125" in _text(ROWS, Format.LATEX)
    page = render_html(ROWS, {})
    assert '<th class="name">half &lt;of&gt; keep</th>' in page
    assert '<td class="name">0.125</td>' in page
    assert "half: of it." in page
    _, data, table = write_reports(ROWS, tmp_path, {})
    assert json.loads(data.read_text())["rows"][1]["seed"] == 0
    assert list(csv.DictReader(io.StringIO(table.read_text())))[1]["seed"] == "0"
    assert "half <of> keep" not in titles(ROWS[:1]), "no row has a ratio"


def test_rows_that_differ_say_in_what():
    assert titles(ROWS)[:3] == ["reducer", "keep", "accuracy % [95 % CI]"]
    other = [*ROWS, dataclasses.replace(ROWS[1], seed=1, task="u")]
    assert titles(other)[:4] == titles(other, narrow=True)[:4] == ["task", "seed", "reducer", "keep"]


def test_results_of_two_folders_have_columns_of_their_own():
    rows = [dataclasses.replace(row, reference="A: x", versus_reference=VERSUS) for row in ROWS]
    assert {"against", "difference", "lost/won", "changed"} <= set(titles(rows))
    assert not {"vs unpruned", "vs random", "retained", "speed-up"} & set(titles(rows))
    assert titles(rows, narrow=True) == ["reducer", "keep", "accuracy", "diff", "p", "lost/won", "tokens"]
    assert "lost/won: questions that only" in legend(rows)


def test_the_legend_explains_what_is_shown_and_nothing_else():
    text = legend(ROWS)
    assert "vs unpruned (diff)" in text
    assert "4 prompts at once" in text
    assert "evidence" not in text
    assert "evidence: share" in legend([dataclasses.replace(ROWS[0], evidence_recall=0.5)])
