# SPDX-License-Identifier: Apache-2.0
"""Qwen3.5, whose layers are recurrent but for some: a dropped token is one that was never there."""

from __future__ import annotations

import sys

import pytest
import tiny
import torch
import zoo
from oracles import PLANS, TOLERANCE, TestReducer, extended, generate, visual_and_real
from transformers import CONFIG_MAPPING

import vtoken
from vtoken.adapters import adapter_for
from vtoken.encoder import EncoderRead
from vtoken.reducers.base import Reducer

every_family = pytest.mark.parametrize("family", [family for family in tiny.HYBRID if family in CONFIG_MAPPING])
CUTS = {"before": PLANS["before"], "between": TestReducer(before=0.7, at=((1, 0.6), (2, 0.4)))}
STEPS = {"output_logits": True, "return_dict_in_generate": True}
RECEIVED = EncoderRead("received", -1)


class Look(Reducer):
    """Keeps all, and remembers the last token's attention and what the tower's last block attends to."""

    name = "look"

    def __init__(self, layer):
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "seen", {})

    def encoder_reads(self):
        return (RECEIVED,)

    def taps(self, depth):
        return {self.layer: "last"}

    def layers(self, depth):
        return (depth,)

    def before_llm(self, ctx):
        self.seen["received"] = ctx.encoder[RECEIVED]

    def at_layer(self, layer, ctx):
        self.seen["rows"] = ctx.attention[self.layer].probabilities


def made(family, images_per_row):
    model, inputs = tiny.make(family, images_per_row)
    return zoo.Case(model, inputs, [], images_per_row)


@pytest.mark.parametrize("plan", CUTS)
@every_family
def test_dropping_equals_hiding_at_every_decode_step(family, plan):
    case = made(family, (1, 2, 0))
    model, inputs = case.model, case.inputs
    adapter, (visual, real) = adapter_for(model), visual_and_real(inputs)
    with torch.no_grad():
        whole = model(**inputs).logits[:, -1]
        with vtoken.reduce(model, CUTS[plan]):
            out = generate(model, inputs, 3, **STEPS)
        assert (out.logits[0] - whole)[:2].abs().max() > 100 * TOLERANCE["atol"]  # or the oracle shows nothing
        length = inputs["input_ids"].shape[1]
        for step in range(3):
            longer = extended(model, inputs, out.sequences[:, length : length + step])
            with zoo.oracle(adapter, CUTS[plan], visual, real):
                wanted = model(**longer).logits[:, -1]
            torch.testing.assert_close(out.logits[step], wanted, **TOLERANCE)


@every_family
def test_decoder_rows_equal_eager(family):
    case = made(family, (1, 2))
    adapter = adapter_for(case.model)
    layer = next(i for i, one in enumerate(adapter.layers) if adapter.has_attention(one))
    look = Look(layer)
    with vtoken.reduce(case.model, look), torch.no_grad():
        case.model(**case.inputs)
    wanted = zoo.eager_rows(case, adapter.attention(adapter.layers[layer]))
    torch.testing.assert_close(look.seen["rows"][:, :, 0], wanted[:, :, -1], atol=1e-5, rtol=1e-4)


@every_family
def test_encoder_statistics_equal_eager(family):
    """The mean over a token's four patches of what all patches of its picture attend to."""
    case = made(family, (1,))
    block = case.model.model.visual.blocks[-1].attn
    source, found = sys.modules[type(block).__module__], []
    original = source.eager_attention_forward

    def spy(module, *args, **kwargs):
        out = original(module, *args, **kwargs)
        if module is block:
            found.append(out[1])
        return out

    case.model.set_attn_implementation("eager")
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(source, "eager_attention_forward", spy)
        case.model(**case.inputs)
    (weights,) = found
    wanted = weights[0].mean((0, 1)).unflatten(0, (-1, 4)).mean(1)
    case.model.set_attn_implementation("sdpa")
    look = Look(next(i for i, one in enumerate(case.model.model.language_model.layers) if hasattr(one, "self_attn")))
    with vtoken.reduce(case.model, look), torch.no_grad():
        case.model(**case.inputs)
    assert float(wanted.std()) > 1e-5  # or any map would do
    torch.testing.assert_close(look.seen["received"][0, : len(wanted)], wanted, atol=1e-6, rtol=1e-4)
