# SPDX-License-Identifier: Apache-2.0
"""Attention rows read under any backend equal eager ``output_attentions``."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import tiny
import torch

import vtoken
from vtoken.encoder import EncoderRead
from vtoken.reducers.base import Reducer

every_family = pytest.mark.parametrize("family", list(tiny.BUILDERS))
every_attention = pytest.mark.parametrize("attn", ["eager", "sdpa"])


@dataclass(frozen=True)
class Spy(Reducer):
    """Records what it is shown, cuts nothing."""

    name = "spy"
    reads: tuple = ()
    tapped: tuple = ()
    peeked: tuple = ()

    def __post_init__(self):
        object.__setattr__(self, "seen", {})

    def encoder_reads(self):
        return self.reads

    def taps(self, depth):
        return dict(self.tapped)

    def layers(self, depth):
        return tuple(layer for layer, _ in self.peeked)

    def before_llm(self, ctx):
        self.seen["ctx"] = ctx

    def at_layer(self, layer, ctx):
        self.seen[layer] = ctx.peek(dict(self.peeked)[layer])


def eager_attentions(family, batch):
    model, inputs = tiny.make(family, batch, attn="eager")
    with torch.no_grad():
        out = model(**inputs, output_attentions=True)
        calls = []
        model.model.vision_tower.register_forward_hook(lambda m, a, o: calls.append(o))
        pixels = inputs["pixel_values"]
        if pixels.dim() == 5:
            pixels = pixels.flatten(0, 1)
        vision = model.model.vision_tower(pixels, output_attentions=True).attentions
    return out.attentions, vision


@every_attention
@every_family
@pytest.mark.parametrize("batch", [(1,), (1, 2)], ids=str)
def test_decoder_rows_equal_eager(family, attn, batch):
    wanted, _ = eager_attentions(family, batch)
    model, inputs = tiny.make(family, batch, attn=attn)
    spy = Spy(tapped=((1, "last"), (2, "text")), peeked=((2, "question"), (3, "last")))
    with vtoken.reduce(model, spy), torch.no_grad():
        model(**inputs)
    ctx = spy.seen["ctx"]
    torch.testing.assert_close(ctx.attention[1].probabilities[:, :, 0], wanted[1][:, :, -1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(spy.seen[3].probabilities[:, :, 0], wanted[3][:, :, -1], atol=1e-5, rtol=1e-4)
    for row in range(len(batch)):
        text = ctx.text[row].nonzero()[:, 0]
        valid = ctx.attention[2].valid[row]
        got = ctx.attention[2].probabilities[row][:, valid]
        torch.testing.assert_close(got, wanted[2][row][:, text], atol=1e-5, rtol=1e-4)
        question = text[text > ctx.visual[row].nonzero()[:, 0].max()]
        got = spy.seen[2].probabilities[row][:, spy.seen[2].valid[row]]
        torch.testing.assert_close(got, wanted[2][row][:, question], atol=1e-5, rtol=1e-4)


@every_attention
@pytest.mark.parametrize("layer", [-2, -1, 0])
def test_encoder_statistics_equal_eager(attn, layer):
    _, wanted = eager_attentions("llava", (2,))
    model, inputs = tiny.make("llava", (2,), attn=attn)
    names = ("cls", "received", "given", "cls_logits", "keys", "best")
    spy = Spy(reads=tuple(EncoderRead(name, layer) for name in names))
    with vtoken.reduce(model, spy), torch.no_grad():
        model(**inputs)
    found = {read.what: values for read, values in spy.seen["ctx"].encoder.items()}
    full = wanted[layer].mean(1)
    close = {"atol": 1e-6, "rtol": 1e-4}
    torch.testing.assert_close(found["cls"], full[:, 0, 1:], **close)
    torch.testing.assert_close(found["best"], full[:, 0, 1:], **close)
    torch.testing.assert_close(found["received"], full[:, 1:, 1:].mean(1), **close)
    torch.testing.assert_close(found["given"], full[:, 1:, 1:].mean(2), **close)
    assert found["keys"].shape == (2, 16, 8)


def test_encoder_maps_follow_the_anyres_packing():
    """[CLS] attention of every kept token equals the one of its view and patch; newlines have none."""
    model, inputs = tiny.make("llava_next", (2,))
    _, wanted = eager_attentions("llava_next", (2,))
    spy = Spy(reads=(EncoderRead("cls"),))
    with vtoken.reduce(model, spy), torch.no_grad():
        model(**inputs)
    ctx = spy.seen["ctx"]
    scores = ctx.encoder[EncoderRead("cls")]
    most = inputs["pixel_values"].shape[1]
    for image, layout in enumerate(ctx.layouts):
        at = ~layout.newline
        views = image * most + layout.view[at]
        patch = layout.row[at] * 4 + layout.column[at]
        eager = wanted[-2].mean(1)[:, 0, 1:][views, patch]
        found = scores[image, : len(layout.view)]
        torch.testing.assert_close(found[at], eager, atol=1e-6, rtol=1e-4)
        assert found[layout.newline].isnan().all()
        assert layout.newline.any()


def test_no_encoder_attention_is_computed_unless_asked(monkeypatch):
    """A reducer never asks the model for attention outputs, and the decoder keeps its backend."""
    model, inputs = tiny.make("llava", (1,))
    asked = []
    for module in model.modules():
        if hasattr(module, "config"):
            module.register_forward_pre_hook(
                lambda m, a, k: asked.append(k.get("output_attentions")), with_kwargs=True
            )
    with vtoken.reduce(model, "todre", keep=0.5), torch.no_grad():
        model(**inputs)
    assert not any(asked)
