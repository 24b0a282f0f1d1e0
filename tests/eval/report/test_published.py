# SPDX-License-Identifier: Apache-2.0
"""Published numbers are found for the rows that they are about, and for no others."""

import pytest

from vtoken.eval.comparison.summary import Row
from vtoken.eval.errors import EvalError
from vtoken.eval.report.columns import shown
from vtoken.eval.report.page import render_html
from vtoken.eval.report.published import BESIDE, beside_table, load_published, published_retained, published_text

LLAVA, NEXT = "llava-hf/llava-1.5-7b-hf", "llava-hf/llava-v1.6-vicuna-7b-hf"
VIDEO = "llava-hf/llava-onevision-qwen2-7b-ov-hf"
TABLE = """
tables:
  - source: a paper
    evidence: paper
    model: org/model
    keep: [64]
    retained: {fopru: [90.0]}
"""


def row(reducer, keep, model=LLAVA, task="gqa", retained=0.9):
    return Row(cell="c", model=model, task=task, reducer=reducer, keep=keep, retained=retained)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [  # as the papers' tables have them, by hand
        (row("zooprune", 64), ("95.2 (9)", "ZOO-Prune, arXiv 2509.24837")),
        (row("fastv (layer=2)", 192), ("87.75 (9)*", "ZOO-Prune, arXiv 2509.24837")),
        (row("scope", 32), ("93.5 (8)", "TOPS paper")),
        (row("todre", 288, NEXT), ("95 (8)", "ToDRE, arXiv 2505.18757v2, Table 1")),
        (row("divprune", 0.1, "Qwen/Qwen2.5-VL-7B-Instruct"), ("76.09 (11)", "documents of AngelSlim")),
        (row("aim", 0.25, VIDEO, "mlvu_dev"), ("98.45*", "AIM, arXiv 2412.03248, 32 frames")),  # 63.7 of 64.7
    ],
)
def test_rows_have_the_number_of_their_model_reducer_and_budget(found, wanted):
    one = published_retained(found)
    assert one.text == wanted[0]
    assert one.source.endswith(wanted[1])


@pytest.mark.parametrize(
    "other",
    [
        row("zooprune", 63),
        row("zooprune", 64, "someone/llava-1.5-7b"),
        row("zooprune (step=0.1)", 64),
        row("unpruned", None),
        row("aim", 0.25, VIDEO, "videomme_long"),  # published by task, and not for this one
    ],
)
def test_other_rows_have_none(other):
    assert published_retained(other) is None
    assert published_text(other) == ""


@pytest.mark.parametrize(("keep", "fits"), [(0.1111, True), (0.1112, True), (0.2, False), (1.0, False)])
def test_ratios_and_counts_meet_where_the_number_of_tokens_is_fixed(keep, fits):
    assert (published_retained(row("zooprune", keep)) is not None) == fits  # 64 of 576


def test_ratios_and_counts_do_not_meet_elsewhere():
    assert published_retained(row("zooprune", 288, "Qwen/Qwen2.5-VL-7B-Instruct")) is None


def test_our_mean_over_tasks_stands_beside_every_source():
    rows = [row("divprune", 64, retained=0.9), row("divprune", 64, task="pope", retained=0.8), row("random", 64)]
    found = [dict(zip(BESIDE, line, strict=True)) for line in beside_table(rows)]
    assert [(line["ours %"], line["tasks"], line["published %"]) for line in found] == [
        ("85.0", "2", "94.42 (9)"),
        ("85.0", "2", "93.7 (8)"),
    ]
    assert {line["evidence"] for line in found} == {"secondary"}


def test_the_column_is_there_where_something_is_published():
    assert "published" in [column.title for column in shown([row("random", 64), row("divprune", 64)])]
    assert "published" not in [column.title for column in shown([row("random", 64)])]


def test_every_number_has_a_source_and_is_a_share():
    found = load_published()
    assert len(found) > 60
    assert all(one.source and 0.5 < one.retained < 1.1 for one in found)
    assert {one.evidence for one in found} == {"paper", "secondary", "code"}


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("evidence: paper", "evidence: hearsay", r"tables\[0\]\.evidence='hearsay' is not possible"),
        ("keep: [64]", "keep: [64, 32]", r"tables\[0\]: retained\.fopru has 1 values: give one for each of keep"),
        ("fopru", "fopro", r"tables\[0\]: Unknown reducer 'fopro': did you mean 'fopru'"),
        ("source", "sauce", r"tables\[0\]: Unknown key 'sauce': did you mean 'source'"),
        ("keep: [64]", "keep: [0]", r"tables\[0\]\.keep\[0\]: keep=0 would leave no token"),
        ("    model: org/model\n", "", r"the key 'tables\[0\]\.model' is missing"),
    ],
)
def test_wrong_files_are_a_sentence(tmp_path, old, new, sentence):
    path = tmp_path / "published.yaml"
    path.write_text(TABLE.replace(old, new))
    with pytest.raises(EvalError, match=rf"published\.yaml: .*{sentence}"):
        load_published(path)


def test_the_report_shows_both_tables():
    page = render_html([row("unpruned", None, retained=1.0), row("divprune", 64)], {})
    assert "<th>published</th>" in page
    assert "94.42 (9)" in page.split("Published numbers beside ours")[1]
