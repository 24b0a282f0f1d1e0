# SPDX-License-Identifier: Apache-2.0
"""Which regressions are shown, and what their pictures show."""

import numpy as np
import pytest
import torch
from finished import made_up_run, save_run
from PIL import Image

import vtoken
from vtoken.drawing import BEFORE, INSIDE, LONG_EDGE, shade
from vtoken.eval.comparison.regressions import worst_regressions
from vtoken.eval.comparison.runs import runs_of
from vtoken.eval.report.pictures import draw_regressions
from vtoken.eval.store.results import Store


def run(reducer, scores, tokens=10):
    samples = [
        {
            "doc_id": i,
            "score": score,
            "answer": f"{reducer}{i}",
            "target": "yes",
            "tokens": {"visual_per_layer": tokens},
        }
        for i, score in enumerate(scores)
    ]
    return made_up_run(reducer, samples)


def shown(runs, count):
    return [(found.run.reducer, found.doc_id) for found in worst_regressions(runs, count)]


def test_large_losses_at_large_budgets_first_and_each_reducer_in_turn():
    whole = run("unpruned", [1, 1, 1, 1, 0])
    runs = [whole, run("random", [0, 0, 0, 0, 1]), run("a", [1, 0, 0, 1, 1], 10), run("b", [1, 1, 1, 0.5, 0], 90)]
    assert shown(runs, 2) == [("a", 1), ("b", 3)], "each reducer once, the larger loss first"
    assert shown(runs, 9) == [("a", 1), ("b", 3), ("a", 2), ("random", 0)], "random last, no document twice"
    (first,) = worst_regressions(runs, 1)
    assert (first.target, first.before, first.after, first.drop) == ("yes", "unpruned1", "a1", 1)


def test_nothing_to_show_without_losses_or_without_the_unpruned_run():
    assert shown([run("unpruned", [1, 0]), run("a", [1, 1])], 4) == []
    assert shown([run("a", [0, 0])], 4) == []


def test_pictures_are_dark_where_tokens_are_dropped():
    box = torch.tensor([[0, 0, 50, 50], [50, 0, 100, 50], [0, 50, 50, 100], [float("nan")] * 4])
    kept = {0: torch.tensor([True, True, False, True]), 2: torch.tensor([True, False, False, True])}
    zeros = torch.zeros(4, dtype=torch.long)
    tokens = vtoken.TokenMap(zeros, zeros, zeros, zeros, box, [(100, 100)], kept, {})
    pixels = np.asarray(shade(Image.new("RGB", (100, 100), (200, 200, 200)), tokens))
    assert pixels.shape == (LONG_EDGE, LONG_EDGE, 3)
    near, far = LONG_EDGE // 4, 3 * LONG_EDGE // 4
    found = [pixels[y, x, 0] for y, x in ((near, near), (near, far), (far, near), (far, far))]
    assert found == pytest.approx([200, 200 * (1 - INSIDE), 200 * (1 - BEFORE), 200 * (1 - BEFORE)], abs=1)


def test_regressions_are_drawn_with_the_model(tmp_path, make_cell):
    store, cells = Store(tmp_path), [make_cell(), make_cell("fopru", keep=36)]
    for cell, rate in zip(cells, (1.0, 0.5), strict=True):
        save_run(store, cell, rate, count=8)
    (picture,), remarks = draw_regressions(runs_of(cells, store), 1)
    assert remarks == []
    assert (picture.tokens, picture.kept, picture.last) == (144, 36, 36)
    assert picture.image.startswith("data:image/jpeg;base64,")
    assert picture.question.endswith("?")


def test_what_cannot_be_drawn_is_said(tmp_path, make_cell, monkeypatch):
    store, cells = Store(tmp_path), [make_cell(), make_cell("fopru", keep=36)]
    for cell, rate in zip(cells, (1.0, 0.5), strict=True):
        save_run(store, cell, rate, count=8)
    monkeypatch.setattr("vtoken.eval.sweeps.cells.weights_id", lambda spec: "other")
    pictures, remarks = draw_regressions(runs_of(cells, store), 2)
    assert pictures == []
    assert len(remarks) == 1
    assert "no longer those of the results" in remarks[0]
