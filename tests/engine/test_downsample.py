# SPDX-License-Identifier: Apache-2.0
"""The control that encodes a smaller picture, against stock models that are given one."""

from __future__ import annotations

import pytest
import tiny
import torch
from oracles import TOLERANCE, alone
from torch.nn import functional
from transformers import Qwen2VLImageProcessor

import vtoken
from vtoken.adapters import adapter_for
from vtoken.reducers.downsample import smaller_grid


@pytest.mark.parametrize(("keep", "grid"), [(0.25, (2, 2)), (0.5, (4, 2)), (1, (1, 1)), (0.8, (4, 3))])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_llava_answers_as_it_does_for_a_small_picture(tower, keep, grid):
    """The stock model on a prompt with that many placeholders, the small picture's features in their place."""
    model, inputs = tiny.make("llava", (1,), tower=tower)
    with vtoken.reduce(model, vtoken.Downsample(keep=keep), positions="compact"), torch.no_grad():
        found = model(**inputs).logits[0, -1]
        assert vtoken.stats(model).tokens_kept == grid[0] * grid[1]
    size = [cells * tiny.PATCH for cells in grid]
    small = functional.interpolate(inputs["pixel_values"], size, mode="bicubic", antialias=True)
    ids = inputs["input_ids"][0]
    start = int((ids == tiny.IMAGE_ID).nonzero()[0])
    text = model.get_input_embeddings()(torch.cat([ids[:start], ids[start + 16 :]]))
    with torch.no_grad():
        features = model.get_image_features(small, interpolate_pos_encoding=True).pooler_output[0]
        embeds = torch.cat([text[:start], features, text[start:]])[None]
        wanted = model(inputs_embeds=embeds).logits[0, -1]
    torch.testing.assert_close(found, wanted, **TOLERANCE)


@pytest.mark.parametrize("sizes", [[(56, 84)], [(84, 56), (112, 28)]])
def test_qwen_gets_the_patches_of_the_small_picture(sizes):
    """What the family's own image processor makes of a picture that was resized before it."""
    model, _ = tiny.make("qwen2_5_vl", (1,))
    adapter = adapter_for(model)
    vision = model.config.vision_config
    cell = vision.patch_size * adapter.merge
    processor = Qwen2VLImageProcessor(
        patch_size=vision.patch_size,
        merge_size=adapter.merge,
        temporal_patch_size=vision.temporal_patch_size,
        do_resize=False,
        do_rescale=False,
        do_normalize=False,
    )
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.rand(3, h // 14 * cell // 2, w // 14 * cell // 2, generator=generator) for h, w in sizes]
    given = [dict(processor(images=picture, return_tensors="pt")) for picture in pictures]
    call = {name: torch.cat([one[name] for one in given]) for name in given[0]}
    grids = [(2, 1), (1, 1)][: len(sizes)]
    found = adapter.resampled("image", call, grids)
    for number, (picture, (rows, columns)) in enumerate(zip(pictures, grids, strict=True)):
        small = functional.interpolate(picture[None], (rows * cell, columns * cell), mode="bicubic", antialias=True)
        wanted = processor(images=small[0], return_tensors="pt")
        assert found["image_grid_thw"][number].tolist() == wanted["image_grid_thw"][0].tolist()
        before = int(found["image_grid_thw"][:number].prod(1).sum())
        rows_found = found["pixel_values"][before : before + len(wanted["pixel_values"])]
        torch.testing.assert_close(rows_found, wanted["pixel_values"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llava", "vipllava", "qwen2_vl", "qwen2_5_vl"])
def test_a_batch_gives_what_each_row_gives_alone(family):
    model, inputs = tiny.make(family, (1, 2))
    with vtoken.reduce(model, vtoken.Downsample(keep=0.4)), torch.no_grad():
        together = model(**inputs).logits
        assert all(1 <= image.kept <= max(1, round(0.4 * image.tokens)) for image in vtoken.stats(model).images)
        for row in range(2):
            logits = model(**alone(inputs, row, (1, 2))).logits
            torch.testing.assert_close(together[row : row + 1, -logits.shape[1] :], logits, **TOLERANCE)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "internvl", "qwen3_vl"])
def test_families_that_cannot_are_refused(family):
    model, inputs = tiny.make(family, (1,))
    with vtoken.reduce(model, "downsample"), pytest.raises(ValueError, match=r"the reducer 'pooled'"):
        model(**inputs)


def test_clips_are_refused():
    model, inputs = tiny.make("qwen2_5_vl", (1,), video=True)
    with vtoken.reduce(model, "downsample"), pytest.raises(ValueError, match="cannot be encoded smaller"):
        model(**inputs)


def test_it_comes_first_in_a_chain():
    chain = vtoken.Chain([vtoken.Downsample(keep=0.5), vtoken.DivPrune(keep=0.25)])
    model, inputs = tiny.make("llava", (1,))
    with vtoken.reduce(model, chain), torch.no_grad():
        model(**inputs)
        assert vtoken.stats(model).tokens_kept == 4
    with pytest.raises(ValueError, match=r"'downsample' .* put it first"):
        vtoken.Chain([vtoken.DivPrune(keep=0.5), vtoken.Downsample(keep=0.25)])


@pytest.mark.parametrize("shape", [(24, 24), (12, 30), (3, 40)])
def test_the_small_grid_has_the_shape_of_the_large_one(shape):
    for most in range(1, shape[0] * shape[1] + 1):
        rows, columns = smaller_grid(*shape, most)
        assert 1 <= rows <= shape[0]
        assert 1 <= columns <= shape[1]
        assert most / 2 <= rows * columns <= most
