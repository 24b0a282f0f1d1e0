# SPDX-License-Identifier: Apache-2.0
"""How the towers with small patches begin, and the smaller scenes that they see first."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from vtoken.mini.models import ARCHITECTURES
from vtoken.mini.training.batches import train_rng
from vtoken.mini.training.feed import Feed
from vtoken.mini.training.labels import IGNORE
from vtoken.mini.training.starts import transplant, transplant_rotary
from vtoken.mini.world import IMAGE


def test_a_transplanted_tower_sees_a_picture_as_clip_sees_it_enlarged():
    source = ARCHITECTURES["mini-llava"].build_model(1).model.vision_tower.eval()
    tower = ARCHITECTURES["mini-internvl"].build_model(2).model.vision_tower.eval()
    torch.nn.init.normal_(source.pre_layrnorm.weight, 1.0, 0.2)
    torch.nn.init.normal_(source.pre_layrnorm.bias)
    pixels = torch.randn(2, 3, IMAGE // 2, IMAGE // 2)
    transplant(tower, source, pixels)
    with torch.no_grad():
        wanted = source.pre_layrnorm(source.embeddings(F.interpolate(pixels, scale_factor=2.0)))
        found = tower.embeddings(pixels)
        found = found[0] if isinstance(found, tuple) else found
        bias = source.pre_layrnorm.bias
        torch.testing.assert_close(found[:, 0], wanted[:, 0], atol=1e-2, rtol=0)  # the norm has an epsilon
        # the norm's own deviation differs from patch to patch: equal but for a factor near 1
        along = F.cosine_similarity(found[:, 1:] - bias, wanted[:, 1:] - bias, dim=-1)
        torch.testing.assert_close(along, torch.ones_like(along), atol=1e-4, rtol=0)
        factor = (found - bias).norm(dim=-1) / (wanted - bias).norm(dim=-1)
        assert abs(float(factor[:, 1:].mean()) - 1) < 0.05
        states = torch.randn(1, 5, 128)
        for layer, copied in zip(tower.encoder.layer, source.encoder.layers, strict=False):
            out, other = layer(states), copied(states, attention_mask=None)
            out, other = (x[0] if isinstance(x, tuple) else x for x in (out, other))
            torch.testing.assert_close(out, other, atol=1e-4, rtol=1e-4)


def test_a_rotary_tower_computes_what_clip_computes_but_for_its_positions():
    """Without rotation, centred states go through a block as through CLIP's layer, up to the gate's approximation."""
    source = ARCHITECTURES["mini-llava"].build_model(1).model.vision_tower.eval()
    tower = ARCHITECTURES["mini-qwen2.5-vl"].build_model(2).model.visual.eval()
    for name, parameter in source.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("norm1.weight") else 0.0, 0.3)
    pixels = torch.randn(2, 3, IMAGE // 2, IMAGE // 2)
    transplant_rotary(tower, source, pixels)
    rows, head = 6, 128 // 4
    still = torch.ones(rows, head), torch.zeros(rows, head)
    states = torch.randn(rows, 128)
    states = states - states.mean(-1, keepdim=True)
    with torch.no_grad():
        for block, copied in zip(tower.blocks, source.encoder.layers, strict=False):
            out = block(states, cu_seqlens=torch.tensor([0, rows], dtype=torch.int32), position_embeddings=still)
            wanted = copied(states[None], attention_mask=None)
            wanted = (wanted[0] if isinstance(wanted, tuple) else wanted).view(rows, 128)
            wanted = wanted - wanted.mean(-1, keepdim=True)
            added = (wanted - states).norm()
            assert float((out - wanted).norm() / added) < 0.05
        picture = torch.randn(3, 2, 7, 7)
        picture[:, 1] = picture[:, 0]  # a picture is two equal frames
        seen = tower.patch_embed(picture.view(1, -1))[0]
        enlarged = F.interpolate(picture[None, :, 0], scale_factor=2.0)
        wanted = F.conv2d(enlarged, source.embeddings.patch_embedding.weight)[0, :, 0, 0]
        wanted = (wanted - wanted.mean()) * source.pre_layrnorm.weight
        assert float(F.cosine_similarity(seen, wanted - wanted.mean(), dim=0)) > 0.9999


def test_smaller_scenes_show_more_things_in_a_picture_of_the_usual_size():
    architecture = ARCHITECTURES["mini-internvl"]
    feed = Feed(architecture, architecture.build_model(0), train_rng(15))
    usual, small = feed.draw({"scene": 1.0}, crowded=True), feed.draw_small(8)
    assert small.batch.paint(np.random.default_rng(0))[0][0].shape == (IMAGE, IMAGE, 3)
    assert len(small.batch.scenes[0][0].items) > 2 * len(usual.batch.scenes[0][0].items)
    assert (small.batch.labels["letter"] == IGNORE).all()  # too small to be read
    item = small.batch.scenes[0][0].of("shape")[-1]
    boxes = small.batch.places.boxes
    inside = (boxes[:, 0] <= item.x) & (item.x < boxes[:, 2]) & (boxes[:, 1] <= item.y) & (item.y < boxes[:, 3])
    assert (small.batch.labels["kind"][0][torch.from_numpy(inside)] == 1).all()
