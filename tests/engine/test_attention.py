# SPDX-License-Identifier: Apache-2.0
"""Attention rows read under any backend equal eager ``output_attentions``."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import tiny
import torch
from oracles import eager_encoder

import vtoken
from vtoken.encoder import EncoderRead
from vtoken.reducers.base import Reducer

every_family = pytest.mark.parametrize("family", [name for name in tiny.BUILDERS if name not in tiny.HYBRID])
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
        return (*(layer for layer, _ in self.peeked), depth)

    def before_llm(self, ctx):
        self.seen["ctx"] = ctx

    def at_layer(self, layer, ctx):
        self.seen[layer] = ctx if layer == ctx.depth else ctx.peek(dict(self.peeked)[layer])


def eager_attentions(family, batch):
    """Decoder attentions of a plain eager run."""
    model, inputs = tiny.make(family, batch, attn="eager")
    with torch.no_grad():
        return model(**inputs, output_attentions=True).attentions


@every_attention
@every_family
@pytest.mark.parametrize("batch", [(1,), (1, 2)], ids=str)
def test_decoder_rows_equal_eager(family, attn, batch):
    wanted = eager_attentions(family, batch)
    model, inputs = tiny.make(family, batch, attn=attn)
    spy = Spy(tapped=((1, "last"), (2, "text")), peeked=((2, "question"), (3, "last")))
    with vtoken.reduce(model, spy), torch.no_grad():
        model(**inputs)
    ctx = spy.seen[spy.seen["ctx"].depth]
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
@pytest.mark.parametrize("family", ["llava"])
def test_encoder_statistics_equal_eager(family, attn, layer):
    (wanted,) = eager_encoder(family, (2,), layer)
    model, inputs = tiny.make(family, (2,), attn=attn)
    names = ("cls", "received", "given", "cls_logits", "keys", "best")
    spy = Spy(reads=tuple(EncoderRead(name, layer) for name in names))
    with vtoken.reduce(model, spy), torch.no_grad():
        model(**inputs)
    found = {read.what: values for read, values in spy.seen["ctx"].encoder.items()}
    full = wanted.mean(1)
    close = {"atol": 1e-6, "rtol": 1e-4}
    torch.testing.assert_close(found["cls"], full[:, 0, 1:], **close)
    torch.testing.assert_close(found["best"], full[:, 0, 1:], **close)
    torch.testing.assert_close(found["received"], full[:, 1:, 1:].mean(1), **close)
    torch.testing.assert_close(found["given"], full[:, 1:, 1:].mean(2), **close)
    assert found["keys"].shape == (2, 16, 8)


def test_names_of_one_block_give_the_same_map():
    """Negative indices and shares of the depth (3 blocks) may name a block that another read names as well."""
    model, inputs = tiny.make("llava", (1,))
    spy = Spy(reads=tuple(EncoderRead("cls", layer) for layer in (1, -2, 0.5)))
    with vtoken.reduce(model, spy), torch.no_grad():
        model(**inputs)
    first, *others = spy.seen["ctx"].encoder.values()
    assert len(others) == 2
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("family", ["llava_next"])
def test_encoder_maps_follow_the_anyres_packing(family):
    """[CLS] attention of every kept token equals the one of its view and patch; newlines have none."""
    model, inputs = tiny.make(family, (2,))
    (wanted,) = eager_encoder(family, (2,), -2)
    spy = Spy(reads=(EncoderRead("cls"),))
    with vtoken.reduce(model, spy), torch.no_grad():
        model(**inputs)
    ctx = spy.seen["ctx"]
    scores = ctx.encoder[EncoderRead("cls")]
    first = 0
    for image, layout in enumerate(ctx.layouts):
        at = ~layout.newline
        patch = layout.row[at] * 4 + layout.column[at]
        eager = wanted.mean(1)[:, 0, 1:][first + layout.view[at], patch]
        first += len(layout.grids)
        found = scores[image, : len(layout.view)]
        torch.testing.assert_close(found[at], eager, atol=1e-6, rtol=1e-4)
        assert found[layout.newline].isnan().all()
        assert layout.newline.any()


@pytest.mark.parametrize("video", [False, True], ids=["image", "video"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("layer", [-1, 1])
def test_encoder_maps_of_packed_towers(family, layer, video):
    """Received attention of a token is the mean of its four patches, in raster order: windows are undone."""
    calls = eager_encoder(family, (1, 2), 1 if family == "qwen2_5_vl" else layer, video=video)  # 2 is windowed
    model, inputs = tiny.make(family, (1, 2), video=video)
    read = EncoderRead("received", layer)
    spy = Spy(reads=(read,))
    with vtoken.reduce(model, spy), torch.no_grad():
        model(**inputs)
    patches = torch.cat([weights.mean((0, 1, 2)) for weights in calls])
    wanted = patches.view(-1, 4).mean(1)
    if family == "qwen2_5_vl":
        grid = inputs["video_grid_thw" if video else "image_grid_thw"]
        tower = model.model.visual
        order = tower_order(grid.tolist(), tower.window_size // tower.patch_size // 2)
        wanted = torch.empty_like(wanted).index_copy_(0, order, wanted)
    found = torch.cat([row[row.isfinite()] for row in spy.seen["ctx"].encoder[read]])
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def tower_order(grids, side):
    """Raster index of each token in the order of a tower that goes through ``side`` x ``side`` windows."""
    order, first = [], 0
    for time, height, width in grids:
        rows, columns = height // 2, width // 2
        for step in range(time):
            for top in range(0, rows, side):
                for left in range(0, columns, side):
                    for row in range(top, min(top + side, rows)):
                        start = first + (step * rows + row) * columns
                        order += range(start + left, start + min(left + side, columns))
        first += time * rows * columns
    return torch.tensor(order)


@pytest.mark.parametrize("family", ["internvl", "gemma3", "paligemma", "aya_vision", "cohere2_vision", "idefics3"])
def test_encoder_maps_of_pooled_tiles(family):
    """A token has the mean of the k x k patches that it was made of."""
    (weights,) = eager_encoder(family, (1, 2), -1)
    model, inputs = tiny.make(family, (1, 2))
    read = EncoderRead("received", -1)
    spy = Spy(reads=(read,))
    with vtoken.reduce(model, spy), torch.no_grad():
        model(**inputs)
    first = int(family == "internvl")  # the [CLS] token of the tower
    grid = weights.mean(1)[:, first:, first:].mean(1).view(-1, 1, 4, 4)
    wanted = torch.nn.functional.avg_pool2d(grid, 1 if family == "paligemma" else 2).flatten()
    found = torch.cat([row[row.isfinite()] for row in spy.seen["ctx"].encoder[read]])
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


@every_attention
@pytest.mark.parametrize("family", ["mistral3"])
def test_encoder_maps_of_pictures_that_a_mask_separates(family, attn):
    """Pixtral packs pictures into one sequence: each is a mean over its own queries, pooled 2 x 2 by Mistral 3."""
    (weights,) = eager_encoder(family, (1, 2), -1)
    model, inputs = tiny.make(family, (1, 2), attn=attn)
    reads = EncoderRead("received", -1), EncoderRead("keys", -1)
    spy = Spy(reads=reads)
    with vtoken.reduce(model, spy), torch.no_grad():
        model(**inputs)
    received, keys = (spy.seen["ctx"].encoder[read] for read in reads)
    start = 0
    for image, (height, width) in enumerate((inputs["image_sizes"] // tiny.PATCH).tolist()):
        here = slice(start, start := start + height * width)
        total = weights.mean(1)[0][:, here].sum(0) / (height * width)
        torch.testing.assert_close(total.sum(), torch.tensor(1.0))
        wanted = torch.nn.functional.avg_pool2d(total.view(1, height, width), 2).flatten()
        torch.testing.assert_close(received[image][received[image].isfinite()], wanted, atol=1e-6, rtol=1e-4)
        assert keys[image, : len(wanted)].isfinite().all()


def test_no_encoder_attention_is_computed_unless_asked(monkeypatch):
    """A reducer never asks the model for attention outputs, and the decoder keeps its backend."""
    model, inputs = tiny.make("llava", (1,))
    asked = []
    for module in model.modules():
        if hasattr(module, "config"):
            module.register_forward_pre_hook(lambda m, a, k: asked.append(k.get("output_attentions")), with_kwargs=True)
    with vtoken.reduce(model, "todre", keep=0.5), torch.no_grad():
        model(**inputs)
    assert not any(asked)
