# SPDX-License-Identifier: Apache-2.0
"""Relevance against the textbook formula, and against what the pictures of the embedded model hold."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from oracles import TOLERANCE, alone, visual_and_real
from torch import nn

import vtoken
import vtoken.mini
from vtoken.explain import relevance
from vtoken.mini.questions import KINDS
from vtoken.mini.world import Split, render, sample_scene
from vtoken.training.examples import Example, collate

FAMILIES = ["llava", "qwen2_5_vl", "internvl", "llava_next"]


def by_formula(model, inputs):
    """Chefer et al.: R = I; R += mean_h(relu(grad * A)) R, from the first layer to the last; the last row of R."""
    model.set_attn_implementation("eager")
    out = model(**inputs, output_attentions=True)
    out.logits[0, -1].max().backward(inputs=[a.retain_grad() or a for a in out.attentions])
    length = out.logits.shape[1]
    total = torch.eye(length)
    for attention in out.attentions:
        total = total + (attention.grad * attention).clamp(min=0).mean(1)[0] @ total
    visual, _ = visual_and_real(inputs)
    return total[-1][visual[0]].detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_relevance_is_that_of_the_formula(family):
    model, inputs = tiny.make(family, (2,))
    found = relevance(model, inputs)
    assert len(found) == 2
    torch.testing.assert_close(torch.cat(found), by_formula(model, inputs), **TOLERANCE)


def test_a_batch_gives_what_each_row_gives_alone():
    model, inputs = tiny.make("llava", (1, 2))
    together = relevance(model, inputs)
    single = [found for row in range(2) for found in relevance(model, alone(inputs, row, (1, 2)))]
    for a, b in zip(together, single, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def test_the_model_is_left_as_it_was():
    model, inputs = tiny.make("llava", (1,))
    with torch.no_grad():
        before = model(**inputs).logits  # transformers installs hooks of its own in a first forward pass
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        relevance(model, inputs)
        assert not torch.is_grad_enabled()
        assert torch.equal(model(**inputs).logits, before)
    assert model.model.language_model.config._attn_implementation == "sdpa"
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_parameters_do_not_matter():
    model, inputs = tiny.make("llava", (1,))
    wanted = relevance(model, inputs)[0]
    model.requires_grad_(False)
    assert torch.equal(relevance(model, inputs)[0], wanted)


def test_what_has_no_relevance_is_refused():
    model, inputs = tiny.make("llava", (1,))
    with vtoken.reduce(model, "random"), pytest.raises(ValueError, match="already"):
        relevance(model, inputs)
    hybrid, inputs = tiny.make("qwen3_5", (1,))
    with pytest.raises(NotImplementedError, match="recurrent"):
        relevance(hybrid, inputs)


def test_relevance_points_at_the_evidence():
    """On the embedded model the tokens that show what is asked for are several times as relevant as the others."""
    model, processor = vtoken.mini.load("mini-llava")
    rng = np.random.default_rng([Split.DEV, 5])
    examples, inside = [], []
    while len(examples) < 8:
        scene = sample_scene(rng)
        question = KINDS["color"](scene, rng)
        if question is None:
            continue
        pixels = render(scene, rng)
        examples.append(Example((pixels,), question.text, question.answer))
        x0, y0, x1, y1 = (np.array(question.evidence[0]) / len(pixels) * 12).tolist()
        place = torch.arange(144)
        row, column = place // 12 + 0.5, place % 12 + 0.5
        inside.append((row > y0) & (row < y1) & (column > x0) & (column < x1))
    batch = collate(processor, examples)
    found = relevance(model, batch.whole, batch.labels)
    contrast = [float(r[m].mean() / r[~m].mean()) for r, m in zip(found, inside, strict=True)]
    assert nn.functional.relu(torch.stack(found)).min() >= 0
    assert sorted(contrast)[len(contrast) // 2] > 3
