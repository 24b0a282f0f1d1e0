# SPDX-License-Identifier: Apache-2.0
"""Every registered reducer on every family: exact budgets, ragged batch equals alone, deterministic."""

from __future__ import annotations

import pytest
import tiny
import torch
from cases import REFUSED
from oracles import TOLERANCE, alone, built

import vtoken
from vtoken.adapters import adapter_for
from vtoken.encoder import NEEDS_CLS
from vtoken.reducers.base import KeepReducer

REDUCERS = vtoken.list_reducers()
every_family = pytest.mark.parametrize("family", tiny.CORE)
every_reducer = pytest.mark.parametrize("name", REDUCERS)


def skip_refused(model, reducer):
    """Towers without a [CLS] token, or in which nothing can be dropped: other tests look at the sentences."""
    if model.config.model_type in REFUSED.get(reducer.name, ()):
        pytest.skip("refused with a sentence, which other tests look at")
    if reducer.resampler is not None:
        pytest.skip("has its own tests, test_downsample.py: few families can, and the budget is an upper bound")
    missing = adapter_for(model).leading_tokens == 0
    if missing and any(read.what in NEEDS_CLS for read in reducer.encoder_reads()):
        pytest.skip("the tower has no [CLS] token")


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
    skip_refused(model, reducer)
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
    skip_refused(model, built(name))
    with vtoken.reduce(model, built(name)), torch.no_grad():
        together = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, together), "not deterministic"
        for row in range(2):
            logits = model(**alone(inputs, row, (1, 2))).logits
            torch.testing.assert_close(together[row : row + 1, -logits.shape[1] :], logits, **TOLERANCE)


@every_reducer
@every_family
def test_a_pass_that_keeps_gradients(family, name):
    model, inputs = tiny.make(family, (1, 2))
    skip_refused(model, built(name))
    with vtoken.reduce(model, built(name)):
        with torch.no_grad():
            expected = model(**inputs).logits
        found = model(**inputs, labels=inputs["input_ids"], use_cache=False)
        found.loss.backward()
    torch.testing.assert_close(found.logits, expected, **TOLERANCE)
    assert bool(model.get_input_embeddings().weight.grad.any())
    tower = [p for part, p in model.named_parameters() if "vision" in part or "visual" in part]
    assert any(p.grad is not None and bool(p.grad.any()) for p in tower), "gradients reach the tower"


@every_reducer
def test_a_tower_without_cls_is_served_or_refused_with_a_sentence(name):
    model, inputs = tiny.make("llava", (1,), tower="siglip")
    reducer = built(name)
    if name in REFUSED and "llava" in REFUSED[name]:
        pytest.skip("refused with a sentence, which other tests look at")
    if any(read.what in NEEDS_CLS for read in reducer.encoder_reads()):
        with vtoken.reduce(model, reducer), pytest.raises(ValueError, match=r"no \[CLS\] token"):
            model(**inputs)
        return
    with vtoken.reduce(model, reducer), torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
