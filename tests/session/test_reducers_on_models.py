# SPDX-License-Identifier: Apache-2.0
"""Every registered reducer on every family: exact budgets, ragged batch equals alone, deterministic."""

from __future__ import annotations

import pytest
import tiny
import torch
from oracles import TOLERANCE, alone, generate

import vtoken
from vtoken.reducers.base import KeepReducer

REDUCERS = vtoken.list_reducers()
every_family = pytest.mark.parametrize("family", tiny.CORE)
every_reducer = pytest.mark.parametrize("name", REDUCERS)


def built(name, keep=0.25):
    reducer = vtoken.get_reducer(name)
    return vtoken.get_reducer(name, keep=keep) if isinstance(reducer, KeepReducer) else reducer


def expected_budget(reducer, layout, keep):
    newlines = int(layout.newline.sum())
    if reducer.newlines == "keep":
        return max(1, round((len(layout.view) - newlines) * keep)) + newlines
    return max(1, round(len(layout.view) * keep))


@pytest.mark.parametrize("keep", [0.5, 0.25, 0.1])
@every_reducer
@every_family
def test_budget_is_exact_for_every_image(family, name, keep):
    model, inputs = tiny.make(family, (1, 2, 0))
    reducer = built(name, keep)
    if not isinstance(reducer, KeepReducer) or "before_llm" not in reducer.stages:
        pytest.skip("has no budget before the language model")
    layouts = []
    original = reducer.before_llm

    def spy(ctx):
        layouts.extend(ctx.layouts)
        return original(ctx)

    object.__setattr__(reducer, "before_llm", spy)
    with vtoken.reduce(model, reducer), torch.no_grad():
        model(**inputs)
        found = vtoken.stats(model).images
    assert [image.row for image in found] == [0, 1, 1]
    assert [image.kept for image in found] == [expected_budget(reducer, layout, keep) for layout in layouts]


@every_reducer
@every_family
def test_batch_equals_alone_and_repeats(family, name):
    model, inputs = tiny.make(family, (1, 2))
    with vtoken.reduce(model, built(name)), torch.no_grad():
        together = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, together), "not deterministic"
        for row in range(2):
            logits = model(**alone(inputs, row, (1, 2))).logits
            torch.testing.assert_close(together[row : row + 1, -logits.shape[1] :], logits, **TOLERANCE)
        assert torch.equal(generate(model, inputs), generate(model, inputs, use_cache=False))


@every_reducer
def test_siglip_tower_is_served_or_refused_with_a_sentence(name):
    model, inputs = tiny.make("llava", (1,), tower="siglip")
    try:
        with vtoken.reduce(model, built(name)), torch.no_grad():
            assert model(**inputs).logits.isfinite().all()
    except ValueError as error:
        assert "[CLS]" in str(error)
