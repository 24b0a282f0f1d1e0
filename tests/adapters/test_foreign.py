# SPDX-License-Identifier: Apache-2.0
"""Models of the original llava package and InternVL's remote code, by duck typing."""

from __future__ import annotations

from dataclasses import dataclass

import foreign
import pytest
import torch
from oracles import GREEDY, PLANS, TOLERANCE

import vtoken
from vtoken.encoder import EncoderRead
from vtoken.reducers.base import Reducer

every_model = pytest.mark.parametrize("make", [foreign.llava, foreign.internvl_chat])
every_plan = pytest.mark.parametrize("plan", PLANS)
NEW = {**GREEDY, "max_new_tokens": 6}


@dataclass(frozen=True)
class Look(Reducer):
    """Keeps all, remembers what it saw."""

    name = "look"
    needs_projector = True
    layer: int = -2

    def __post_init__(self):
        object.__setattr__(self, "seen", {})

    def encoder_reads(self):
        return (EncoderRead("cls", self.layer), EncoderRead("keys", self.layer))

    def before_llm(self, ctx):
        self.seen["ctx"] = ctx


@every_plan
@every_model
def test_drop_equals_mask_in_every_mode(make, plan):
    model, inputs = make()
    plain = model.generate(**inputs, **NEW)
    with vtoken.reduce(model, "random", keep=1.0):
        assert torch.equal(model.generate(**inputs, **NEW), plain)
    with vtoken.reduce(model, PLANS[plan]):
        out = model.generate(**inputs, **NEW)
        assert vtoken.stats(model).tokens_per_layer < vtoken.stats(model).tokens_in
        assert torch.equal(model.generate(**inputs, cache_implementation="static", **NEW), out)
        beams = model.generate(**inputs, num_beams=2, **NEW)
    with vtoken.reduce(model, PLANS[plan], backend="mask"):
        assert torch.equal(model.generate(**inputs, **NEW), out)
        assert torch.equal(model.generate(**inputs, num_beams=2, **NEW), beams)
    assert torch.equal(model.generate(**inputs, **NEW), plain)


@every_plan
def test_llava_forward_with_labels_keeps_its_shapes(plan):
    model, inputs = foreign.llava()
    inputs["input_ids"] = inputs.pop("inputs")
    labels = inputs["input_ids"].clone()
    plain = model(**inputs, labels=labels)
    with vtoken.reduce(model, PLANS[plan]):
        out = model(**inputs, labels=labels)
    with vtoken.reduce(model, PLANS[plan], backend="mask"):
        hidden = model(**inputs, labels=labels)
    assert out.logits.shape == plain.logits.shape
    torch.testing.assert_close(out.logits[:, -1], hidden.logits[:, -1], **TOLERANCE)
    assert out.loss.isfinite()


@pytest.mark.parametrize("views", [None, (1, 3, 2)], ids=str)
def test_llava_maps_and_layouts_go_through_its_own_packing(views):
    model, inputs = foreign.llava(views)
    look = Look()
    newline = model.model.image_newline.clone()
    with vtoken.reduce(model, look):
        model.generate(**inputs, **NEW)
    assert torch.equal(model.model.image_newline, newline), "put back"
    assert "encode_images" not in vars(model)
    ctx = look.seen["ctx"]
    counts = views or (1, 1, 1)
    assert [len(layout.view) for layout in ctx.layouts] == [20 * count for count in counts]
    pixels = torch.cat(inputs["images"]) if views else inputs["images"]
    tower = model.get_vision_tower()
    tower.vision_tower.set_attn_implementation("eager")
    attention = tower.vision_tower(pixels, output_attentions=True).attentions[-2].mean(1)[:, 0, 1:]
    first = 0
    for image, layout in enumerate(ctx.layouts):
        at = ~layout.newline
        assert layout.newline.tolist() == ([False] * 4 + [True]) * 4 * counts[image]
        patch = layout.row[at] * 4 + layout.column[at]
        found = ctx.encoder[EncoderRead("cls", -2)][image, : len(at)]
        torch.testing.assert_close(found[at], attention[first + layout.view[at], patch])
        assert found[layout.newline].isnan().all()
        wanted = model.encode_images(pixels)[first + layout.view[at], patch]
        torch.testing.assert_close(ctx.projector(ctx.projector_input[image, : len(at)][at]), wanted)
        torch.testing.assert_close(ctx.features[image, : len(at)][at], wanted)
        first += counts[image]


def test_internvl_chat_joins_tiles_and_reads_the_fused_projection():
    model, inputs = foreign.internvl_chat()
    look = Look(layer=-1)
    with vtoken.reduce(model, look):
        model.generate(**inputs, **NEW)
    ctx = look.seen["ctx"]
    assert [(len(layout.grids), layout.thumbnail) for layout in ctx.layouts] == [(1, None), (2, 1)]
    attention = model.vision_model.layers[-1].attn.last.mean(1)[:, 0, 1:].view(3, 1, 4, 4)
    wanted = torch.nn.functional.avg_pool2d(attention, 2).flatten()
    found = ctx.encoder[EncoderRead("cls", -1)]
    torch.testing.assert_close(found[found.isfinite()], wanted)
    valid = ctx.valid
    torch.testing.assert_close(ctx.projector(ctx.projector_input[valid]), ctx.features[valid])
