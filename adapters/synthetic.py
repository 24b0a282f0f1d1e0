# SPDX-License-Identifier: Apache-2.0
"""Prompts of noise, made without a processor: how many pixels give about how many visual tokens, by family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vtoken.adapters import adapter_for
from vtoken.adapters.base import MODALITIES
from vtoken.engine.encode import encode
from vtoken.engine.tower import VisionReader

Pixels = dict[str, Tensor]
_CODES = 500  # text tokens are drawn from the low, ordinary ids


def synthetic_inputs(model: Any, batch: int = 1, tokens: int = 576, text: int = 32, seed: int = 0) -> dict[str, Tensor]:
    """A batch of equal prompts with pictures of noise.

    Parameters
    ----------
    model : nn.Module
        A model of one of the families that are known here.
    batch, tokens, text : int
        Prompts, visual tokens of each (the nearest number that the family can have), text tokens of each.

    Returns
    -------
    dict
        Arguments of ``generate``, on the model's device.

    Raises
    ------
    NotImplementedError
        For a family whose pixels are not known here.
    """
    kind = model.config.model_type
    if kind not in _BUILDERS:
        known = ", ".join(_BUILDERS)
        raise NotImplementedError(f"Pictures of noise cannot be made for models of type {kind!r}, only for {known}.")
    adapter = adapter_for(model)
    pixels = _BUILDERS[kind](model, batch, tokens)
    weight = next(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    for name, value in pixels.items():
        if value.is_floating_point():
            value = torch.randn(value.shape, generator=generator, dtype=torch.float32, device="cpu").to(weight.dtype)
        pixels[name] = value.to(weight.device)
    with torch.inference_mode():
        _, records = encode(adapter, VisionReader(adapter, (), False), pixels)
    modality, record = next(iter(records.items()))
    placeholder = adapter.placeholders[MODALITIES[modality]]
    assert placeholder is not None, "a family that takes pictures or clips has placeholders for them"
    visual = torch.full((sum(record.lengths) // batch,), placeholder, device="cpu")
    highest = min(_CODES, model.get_input_embeddings().num_embeddings // 2)
    words = torch.randint(3, highest, (batch, text), generator=generator, device="cpu")
    begin = max(text // 2, 1)
    ids = torch.cat([words[:, :begin], visual.expand(batch, -1), words[:, begin:]], 1).to(weight.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    if kind in _TYPES:
        inputs[_TYPES[kind]] = (ids == placeholder).long()
    return inputs


def _pictures(model: Any, batch: int, tokens: int) -> Pixels:
    """Square pictures of a fixed number of tokens, several a prompt."""
    vision = model.config.vision_config
    side, patch = (size if isinstance(size, int) else size[0] for size in (vision.image_size, vision.patch_size))
    ratio = getattr(model.config, "downsample_ratio", 1.0)
    each = round((side // patch * ratio) ** 2)
    return {"pixel_values": torch.empty(batch * max(round(tokens / each), 1), 3, side, side, device="cpu")}


def _anyres(model: Any, batch: int, tokens: int) -> Pixels:
    """One picture a prompt in the aspect ratio whose crops come nearest, or several of the largest."""
    config = model.config
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    each = (side // patch) ** 2

    def views(pinpoint: list[int]) -> int:
        return 1 + pinpoint[0] * pinpoint[1] // side**2

    nearest = min(config.image_grid_pinpoints, key=lambda pinpoint: abs(views(pinpoint) * each - tokens))
    copies = max(round(tokens / (views(nearest) * each)), 1)
    count = batch * copies
    return {
        "pixel_values": torch.empty(count, views(nearest), 3, side, side, device="cpu"),
        "image_sizes": torch.tensor([nearest] * count, device="cpu"),
    }


def _clip(model: Any, batch: int, tokens: int) -> Pixels:
    """One clip a prompt; the model pools each frame to half its side."""
    vision = model.config.vision_config
    side = -(-(vision.image_size // vision.patch_size) // 2)
    frames = max(round(tokens / side**2), 1)
    return {"pixel_values_videos": torch.empty(batch, frames, 3, vision.image_size, vision.image_size, device="cpu")}


def _grid(model: Any, batch: int, tokens: int) -> Pixels:
    """One picture a prompt, as square as possible, flattened to patches."""
    vision = model.config.vision_config
    merge = vision.spatial_merge_size
    rows = max(round(tokens**0.5), 1)
    grid = torch.tensor([[1, rows * merge, max(round(tokens / rows), 1) * merge]] * batch, device="cpu")
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    return {"pixel_values": torch.empty(int(grid.prod(1).sum()), width, device="cpu"), "image_grid_thw": grid}


def _pooled(model: Any, batch: int, tokens: int) -> Pixels:
    """Square pictures that become the number of tokens that the configuration names, several a prompt."""
    side = model.config.vision_config.image_size
    count = batch * max(round(tokens / model.config.mm_tokens_per_image), 1)
    return {"pixel_values": torch.empty(count, 3, side, side, device="cpu")}


def _rows_of_tiles(model: Any, batch: int, tokens: int) -> Pixels:
    """Tiles of a fixed number of tokens, several a prompt, in an axis of their own."""
    vision = model.config.vision_config
    side = vision.image_size
    each = (side // vision.patch_size // model.config.scale_factor) ** 2
    return {"pixel_values": torch.empty(batch, max(round(tokens / each), 1), 3, side, side, device="cpu")}


def _placed_patches(model: Any, batch: int, tokens: int) -> Pixels:
    """One picture a prompt, as square as possible: flat patches, and the column and row of each."""
    vision = model.config.vision_config
    rows = max(round(tokens**0.5), 1)
    height, width = (count * vision.pooling_kernel_size for count in (rows, max(round(tokens / rows), 1)))
    axes = torch.arange(width, device="cpu"), torch.arange(height, device="cpu")
    places = torch.stack(torch.meshgrid(*axes, indexing="xy"), -1).view(1, -1, 2)
    return {
        "pixel_values": torch.empty(batch, height * width, 3 * vision.patch_size**2, device="cpu"),
        "image_position_ids": places.expand(batch, -1, -1),
    }


_QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
_BUILDERS: dict[str, Callable[[Any, int, int], Pixels]] = {
    **dict.fromkeys(("llava", "vipllava", "internvl"), _pictures),
    "llava_next": _anyres,
    "llava_onevision": _clip,
    **dict.fromkeys(_QWEN, _grid),
    "gemma3": _pooled,
    "gemma4": _placed_patches,
    **dict.fromkeys(("idefics3", "smolvlm"), _rows_of_tiles),
}
_TYPES = {**dict.fromkeys((*_QWEN, "gemma4"), "mm_token_type_ids"), "gemma3": "token_type_ids"}
"""Types whose processors say of each token whether it is visual, and the argument in which they do."""
