# SPDX-License-Identifier: Apache-2.0
"""Token maps against ground truth: paint one place of a picture and see which token's features change."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import tiny
import torch
from oracles import generate
from PIL import Image
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
from transformers.models.llava_next.image_processing_llava_next import LlavaNextImageProcessor
from transformers.models.llava_onevision.image_processing_llava_onevision import LlavaOnevisionImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

import vtoken
from vtoken.adapters import adapter_for

SQUARE = {"height": tiny.SIDE, "width": tiny.SIDE}
NORM = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
ANYRES = {"size": SQUARE, "crop_size": SQUARE, "image_grid_pinpoints": tiny.PINPOINTS, "do_center_crop": False}


@contextlib.contextmanager
def no_mixing(model):
    """Attention of the tower adds nothing: a patch sees only itself."""

    def zero(module, args, output):
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    adapter = adapter_for(model)
    blocks = max((m for m in adapter.tower.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    handles = [adapter.vision_attention(layer).register_forward_hook(zero) for layer in range(len(blocks))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def features(model, inputs):
    """(T, D) features of all image tokens."""
    names = ("pixel_values", "image_sizes", "image_grid_thw")
    given = {name: inputs[name] for name in names if name in inputs}
    with torch.no_grad(), no_mixing(model):
        found = model.model.get_image_features(**given, return_dict=True).pooler_output
    parts = [found] if isinstance(found, torch.Tensor) else found
    return torch.cat([part.flatten(0, -2) for part in parts])


@pytest.mark.parametrize(
    "family",
    ["llava", "vipllava", "internvl", "gemma3", "paligemma", "aya_vision", "cohere2_vision", "idefics3", "mistral3"],
)
def test_painting_the_input_of_the_tower(family):
    """Exactly the token whose box holds the painted pixels changes."""
    model, inputs = tiny.make(family, (1,)) if family != "internvl" else tiny.make(family, (0, 1))
    if family == "internvl":  # a picture of one tile, so that the tile is the picture
        inputs["pixel_values"] = inputs["pixel_values"][:1]
        inputs |= tiny.assemble([[3, torch.full((4,), tiny.IMAGE_ID), 5]], torch.Generator().manual_seed(0))
    found = vtoken.token_map(model, inputs)
    before = features(model, inputs)
    assert len(found) == len(before)
    for token, (x0, y0, x1, y1) in enumerate(found.box.long().tolist()):
        painted = dict(inputs, pixel_values=inputs["pixel_values"].clone())
        painted["pixel_values"][..., y0 + 1 : y1 - 1, x0 + 1 : x1 - 1] += 3.0
        changed = (features(model, painted) - before).abs().amax(1) > 1e-4
        assert changed.nonzero()[:, 0].tolist() == [token]


def processed(family, picture):
    """Pixel arguments of a picture (H, W, 3 in [0, 1]) by the family's own processor, made small."""
    image = [Image.fromarray((picture * 255).astype(np.uint8))]
    if family in ("llava_next", "llava_next_video"):
        out = LlavaNextImageProcessor(**ANYRES, **NORM)(image, return_tensors="pt")
    elif family == "llava_onevision":
        out = LlavaOnevisionImageProcessor(**ANYRES, **NORM)(image, return_tensors="pt")
        out.pop("batch_num_images", None)
    elif family == "internvl":
        maker = GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=6, **NORM)
        out = maker(image, return_tensors="pt")
        out.pop("num_patches", None)
    else:
        pixels = {"min_pixels": 8 * 8 * 4, "max_pixels": 64 * 64}
        maker = Qwen2VLImageProcessor(patch_size=4, merge_size=2, temporal_patch_size=2, **pixels, **NORM)
        out = maker(image, return_tensors="pt")
    return dict(out)


@pytest.mark.parametrize("size", [(48, 96), (90, 40), (64, 60)], ids=str)
@pytest.mark.parametrize(
    "family", ["llava_next", "llava_onevision", "llava_next_video", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"]
)
def test_painting_the_original_picture(family, size):
    """In every view, the token that changes most is one whose box holds the painted place."""
    changes = {"ratio": "anyres_max_1"} if family == "llava_onevision" else {}  # interpolates the mosaic
    model, _ = tiny.make(family, (1,), **changes)
    height, width = size
    base = np.full((height, width, 3), 0.5)
    pixels = processed(family, base)
    before = features(model, pixels)
    ids = tiny.assemble([[3, torch.full((len(before),), tiny.IMAGE_ID), 5]], torch.Generator().manual_seed(0))
    found = vtoken.token_map(model, {**ids, **pixels}, None if "image_sizes" in pixels else [size])
    assert found.sizes == [size]
    patches = (found.view >= 0).nonzero()[:, 0]
    for token in patches[:: max(1, len(patches) // 12)].tolist():
        x0, y0, x1, y1 = found.box[token].tolist()
        if min(x1 - x0, y1 - y0) < 3:  # a sliver at the border of the picture
            continue
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        painted = base.copy()
        painted[max(0, round(y - 1.5)) : round(y + 1.5), max(0, round(x - 1.5)) : round(x + 1.5)] = 1.0
        change = (features(model, processed(family, painted)) - before).norm(dim=1)
        for view in found.view[patches].unique().tolist():
            inside = patches[found.view[patches] == view]
            box = found.box[inside]
            holds = (box[:, 0] <= x + 1) & (x - 1 <= box[:, 2]) & (box[:, 1] <= y + 1) & (y - 1 <= box[:, 3])
            if bool(holds.any()) and float(change[inside].max()) > 0.05 * float(change.max()):
                assert bool(holds[change[inside].argmax()]), (token, view)
        inside = patches[found.view[patches] == found.view[token]]
        assert inside[change[inside].argmax()] == token


def test_boxes_tile_every_view():
    """The boxes of a view cover the part of the picture that it shows, without overlap."""
    model, inputs = tiny.make("llava_next", (2, 1))
    found = vtoken.token_map(model, inputs)
    for image, (height, width) in enumerate(found.sizes):
        crops = (found.image == image) & (found.view > 0)
        area = (found.box[:, 2] - found.box[:, 0]) * (found.box[:, 3] - found.box[:, 1])
        assert float(area[(found.image == image) & (found.view == 0)].sum()) == pytest.approx(height * width)
        if bool(crops.any()):
            assert float(area[crops].sum()) == pytest.approx(height * width)


def test_frames_and_separators():
    model, inputs = tiny.make("llava_onevision", (1, 1), video=True)
    found = vtoken.token_map(model, inputs)
    assert found.view.view(2, 13).tolist() == [[0] * 4 + [1] * 4 + [2] * 4 + [-1]] * 2
    assert torch.equal(found.box.isnan().any(1), found.view == -1)
    assert torch.equal(inputs["input_ids"][found.row, found.position], torch.full((26,), tiny.VIDEO_ID))


def test_a_wrapped_model_tells_what_became_of_the_tokens():
    model, inputs = tiny.make("llava", (1, 2))
    with vtoken.reduce(model, "tome", keep=0.25):
        assert vtoken.token_map(model, inputs).kept == {}
        generate(model, inputs, 1)
        found = vtoken.token_map(model, inputs)
    assert found.kept[0].view(3, 16).sum(1).tolist() == [4, 4, 4]
    target = found.merged[0]
    assert bool(found.kept[0][target[target >= 0]].all())
    assert torch.equal(found.image[target[target >= 0]], found.image[target >= 0])


@pytest.mark.parametrize("family", tiny.CORE)
@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_another_prompt_of_as_many_tokens_has_no_history(family, keep):
    """What became of the tokens of a prompt says nothing about those of another picture or question."""
    model, inputs = tiny.make(family, (1, 1))
    sizes = None if family in ("llava_next", "llava_onevision") else [(48, 48)] * 2
    picture, question = dict(inputs), dict(inputs)
    picture["pixel_values"] = inputs["pixel_values"].clone()
    picture["pixel_values"].view(-1)[7] += 0.5
    question["input_ids"] = torch.where(inputs["input_ids"] == inputs["input_ids"][0, -1], 9, inputs["input_ids"])
    with vtoken.reduce(model, "random", keep=keep):
        for run in (lambda: model(**inputs), lambda: generate(model, inputs, 2)):
            run()
            assert vtoken.token_map(model, inputs, sizes).kept
            assert not vtoken.token_map(model, picture, sizes).kept
            assert not vtoken.token_map(model, question, sizes).kept


def test_what_is_missing_is_said():
    model, inputs = tiny.make("internvl", (1,))
    with pytest.raises(ValueError, match="pass sizes="):
        vtoken.token_map(model, inputs)
    with pytest.raises(ValueError, match="2 entries for 1 pictures"):
        vtoken.token_map(model, inputs, [(10, 10), (10, 10)])
    with pytest.raises(ValueError, match="hold no pixels"):
        vtoken.token_map(model, {"input_ids": inputs["input_ids"]})
