# SPDX-License-Identifier: Apache-2.0
"""``vtoken report``: the page in a real browser, where it draws, filters, asks for nothing and runs no foreign code."""

import pytest
from finished import save_run, save_table
from typer.testing import CliRunner

from vtoken.cli import app
from vtoken.eval.store.results import Store

EVIL = "</script><img src=x onerror=alert(1)><script>document.title='broken'</script>"


@pytest.fixture
def folder(tmp_path, make_cell):
    """Results of two tasks, one answer of which is hostile."""
    store, cells = Store(tmp_path / "results"), []
    for task in ("mini", "mini_count"):
        for reducer, rate in ((None, 0.9), ("random", 0.4), ("fopru", 0.7)):
            cells.append(make_cell(reducer, task=task, **({"keep": 36} if reducer else {})))
            save_run(store, cells[-1], rate, count=16, answer=EVIL)
    save_table(store, cells)
    return tmp_path / "results"


def report(folder, *options):
    done = CliRunner().invoke(app, ["report", str(folder), *options])
    assert done.exit_code == 0, done.output
    return folder / "report.html"


def test_the_page_says_where_results_come_from(folder):
    text = report(folder, "--pictures", "0").read_text()
    for part in ("6 runs", "2.15", "<td>p1</td>", "&#34;limit&#34;: 200", "Every run, fully resolved"):
        assert part in text


def test_wrong_input_is_a_sentence(tmp_path):
    for name, sentence in (("none", "There is no folder"), (".", "Nothing is finished")):
        done = CliRunner().invoke(app, ["report", str(tmp_path / name)])
        assert done.exit_code == 2, done.output
        assert sentence in done.stderr


def test_the_page_in_a_browser(folder, page):
    file = report(folder, "--pictures", "2")
    page.goto(file.as_uri())
    assert page.locator("figure img").count() == 2
    assert page.locator("figure img").first.evaluate("image => image.naturalWidth") > 100

    plots = page.locator(".js-plotly-plot")
    assert plots.count() == 2
    assert plots.first.locator(".scatterlayer path.point").count() >= 3
    title = plots.first.locator(".xtitle")
    assert "visual tokens" in title.text_content()
    plots.first.locator(".updatemenu-button").nth(2).click()
    assert "KV cache" in title.text_content()
    assert plots.first.locator(".scatterlayer path.point").count() >= 3

    rows = page.locator("section tbody tr")
    everything = rows.locator("visible=true").count()
    page.fill("#by-reducer", "FOP")
    assert set(rows.locator("visible=true").locator("td:first-child").all_text_contents()) == {"fopru"}
    page.fill("#by-reducer", "")
    assert rows.locator("visible=true").count() == everything
    page.select_option("#by-task", "mini_count")
    assert page.locator("section h2").locator("visible=true").count() == 1

    assert page.locator("figcaption").first.text_content().count(EVIL) == 1, "hostile answers are shown as text"
    assert page.title() == "vtoken: accuracy against visual tokens"
    assert page.events == [file.as_uri()], "no other request, no message, no dialog"
