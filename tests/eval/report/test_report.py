# SPDX-License-Identifier: Apache-2.0
"""Rows, and the files a comparison leaves behind: complete, self-contained, escaped."""

import csv
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from finished import KINDS, save_run

from vtoken.eval.comparison.runs import runs_of
from vtoken.eval.comparison.statistics import Estimate, Paired
from vtoken.eval.comparison.summary import Row, corrected, row_from, summarize
from vtoken.eval.report.columns import lines_of, shown
from vtoken.eval.report.export import as_csv
from vtoken.eval.report.formats import bytes_text
from vtoken.eval.report.page import render_html, write_reports
from vtoken.eval.report.plot import pareto_front, pareto_html
from vtoken.eval.report.render import failures, notes
from vtoken.eval.report.tables import WINS, wins_table
from vtoken.eval.store.results import Store


@pytest.fixture
def finished(tmp_path, make_cell):
    """Cells with made-up answers: unpruned right on 80 %, the others on less."""
    store = Store(tmp_path)
    cells = [make_cell(), make_cell("random", keep=0.25), make_cell("fopru", keep=0.25)]
    for cell, rate in zip(cells, (0.8, 0.4, 0.7), strict=True):
        save_run(store, cell, rate)
    return cells, store


def test_rows_hold_accuracy_difference_and_cost(finished):
    unpruned, random, fopru = summarize(*finished)
    assert unpruned.versus_unpruned is None
    assert unpruned.retained == 1.0
    assert random.versus_unpruned.p_value < 0.001
    assert random.versus_unpruned.difference.value == pytest.approx(random.accuracy.value - unpruned.accuracy.value)
    assert random.retained == pytest.approx(random.accuracy.value / unpruned.accuracy.value)
    assert (fopru.visual_tokens, fopru.visual_kept, fopru.speedup) == (144, 36, 2.0)
    assert set(fopru.kinds) == set(KINDS)
    assert np.mean(list(fopru.kinds.values())) == pytest.approx(fopru.accuracy.value)


def test_cells_without_a_result_have_no_row(finished, make_cell):
    cells, store = finished
    assert len(summarize([*cells, make_cell("uniform", keep=0.5)], store)) == 3


def test_rows_are_compared_with_random_at_the_same_keep(finished, make_cell):
    cells, store = finished
    other = make_cell("fopru", keep=0.5)
    save_run(store, other, 0.75)
    _, random, fopru, without = summarize([*cells, other], store)
    assert random.versus_random is without.versus_random is None
    assert fopru.versus_random.difference.value == pytest.approx(fopru.accuracy.value - random.accuracy.value)
    assert fopru.versus_random.won > 0 == fopru.versus_random.lost


def test_answers_that_turned_are_counted(finished):
    fopru = summarize(*finished)[2].versus_unpruned
    assert (fopru.documents, fopru.won, fopru.changed) == (200, 0, fopru.lost)
    assert fopru.retained.low < fopru.retained.value == pytest.approx(1 - fopru.lost / 160, abs=0.02)


def test_holm_corrects_over_the_rows_of_a_model_and_task():
    def row(task, p):
        return Row("id", "m", task, "x", 0.5, versus_unpruned=Paired(Estimate(-0.1, -0.2, 0), p, 3, 1))

    rows = corrected([row("a", 0.02), row("b", 0.02), row("a", 0.04), Row("id", "m", "a", "y", 0.5)])
    assert [r.versus_unpruned.adjusted for r in rows[:3]] == pytest.approx([0.04, 0.02, 0.04])


def test_runs_on_other_documents_are_compared_on_the_common_ones(finished):
    cells, store = finished
    save_run(store, cells[2], 0.7, count=150, first=100)
    row = summarize(cells, store)[2]
    assert (row.documents, row.versus_unpruned.documents) == (150, 100)
    assert "fopru 0.25 on mini is compared on 100 of its 150 questions." in notes([row])


def test_questions_with_other_answers_are_other_questions(finished):
    cells, store = finished
    changed = [{**sample, "target": "other"} for sample in store.samples(cells[1].id)]
    store.save(store.record(cells[1].id), changed)
    assert summarize(cells, store)[1].versus_unpruned is None


def test_columns_read_well(finished):
    rows = summarize(*finished)
    columns = shown(rows)
    text = dict(zip([column.title for column in columns], lines_of(columns, rows)[1], strict=True))
    assert text["reducer"] == "random"
    assert re.fullmatch(r" ?\d+\.\d \[\d+\.\d, \d+\.\d\]", text["accuracy % [95 % CI]"])
    assert re.fullmatch(r"[+-]\d+\.\d\*", text["vs unpruned"])
    assert re.fullmatch(r"\d+\.\d % \[\d+\.\d, \d+\.\d\]", text["retained"])
    assert (text["p"], text["tokens"], text["speed-up"], text["KV"]) == ("<0.001", "36.0", "2.00x", "146 KiB")


def test_failed_cells_show_why():
    row = Row("id", "m", "t", "todre", 0.5, error="shapes do not match\nsecond line")
    assert lines_of(shown([row]), [row])[0][:3] == ["todre", "0.5", "failed"]
    assert failures([row]) == ["todre 0.5 on t failed: shapes do not match"]


@pytest.mark.parametrize(
    ("number", "text"), [(12, "12 B"), (2048, "2.0 KiB"), (300 * 1024, "300 KiB"), (5 * 1024**3, "5.00 GiB")]
)
def test_bytes(number, text):
    assert bytes_text(number) == text


def test_files_are_complete(finished):
    cells, store = finished
    files = write_reports(summarize(cells, store), store.root, {"limit": 200})
    assert [file.name for file in files] == ["report.html", "results.json", "results.csv"]
    data = json.loads(files[1].read_text())
    assert [row_from(row) for row in data["rows"]] == summarize(cells, store)
    assert (data["settings"], len(data["rows"])) == ({"limit": 200}, 3)
    assert data["rows"][2]["kinds"].keys() == set(KINDS)
    table = list(csv.DictReader(io.StringIO(files[2].read_text())))
    assert len(table) == 3
    assert {"accuracy", "accuracy_low", "unpruned_difference", "random_p_value", "kind_color", "kv_bytes"} <= set(
        table[0]
    )


def test_the_page_needs_no_network(finished):
    page = render_html(summarize(*finished), {}, runs_of(*finished))
    outside = re.sub(r"<script\b.*?</script>", "", page, flags=re.S)
    assert not re.search(r"(src|href)\s*=", outside)
    assert page.count("plotly.js v") == 1
    assert "Content-Security-Policy" in page
    assert "Plotly.newPlot" in page
    assert len(page) > 1_000_000  # plotly's script is inside


EVIL = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"


def test_everything_from_data_is_escaped():
    row = Row("id", EVIL, EVIL, EVIL, 0.5, 8, Estimate(0.5, 0.4, 0.6), None, 1.0, 144, 36, 36, {EVIL: 0.5})
    failed = Row("id", EVIL, EVIL, "x", 0.5, error=EVIL)
    page = render_html([row, failed], {EVIL: EVIL})
    assert "<img src=x" not in page
    assert "<script>alert(2)" not in page
    assert "<img" not in pareto_html([row])


def test_the_front_holds_what_nothing_beats():
    def row(tokens, accuracy):
        return Row("id", "m", "t", "x", 0.5, accuracy=Estimate(accuracy, 0, 1), visual_per_layer=tokens)

    rows = [row(36, 0.7), row(7, 0.5), row(36, 0.8), row(72, 0.8), row(14, 0.4), row(144, 0.9)]
    front = [(found.visual_per_layer, found.accuracy.value) for found in pareto_front(rows)]
    assert front == [(7, 0.5), (36, 0.8), (144, 0.9)]


def test_failed_rows_do_not_break_the_plot():
    assert pareto_html([Row("id", "m", "t", "x", 0.5, error="boom")]) == ""


def test_the_plot_switches_between_what_was_measured(finished):
    rows = summarize(*finished)
    assert [name in pareto_html(rows) for name in ("tokens", "prefill time", "KV memory")] == [True] * 3
    unmeasured = [replace(row, prefill_ms=None, kv_bytes=None) for row in rows]
    assert "prefill time" not in pareto_html(unmeasured)


def test_wins_against_random(finished):
    (line,) = wins_table(summarize(*finished))
    found = dict(zip(WINS, line, strict=True))
    assert (found["reducer"], found["runs"], found["better"], found["worse"]) == ("fopru", "1", "1", "0")


def test_csv_of_failed_rows():
    assert "boom" in as_csv([Row("id", "m", "t", "x", 0.5, error="boom")])
