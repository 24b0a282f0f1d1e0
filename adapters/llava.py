# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 and VipLLaVA: one view per image, one token per patch."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vtoken.adapters.base import Adapter, resize, single_view
from vtoken.context import ItemLayout


class LlavaAdapter(Adapter):
    """`transformers.LlavaForConditionalGeneration` with a CLIP or SigLIP tower."""

    model_types: ClassVar[tuple[str, ...]] = ("llava", "vipllava")

    def __init__(self, model) -> None:
        super().__init__(model)
        vision = model.config.vision_config
        self.side = vision.image_size // vision.patch_size
        self.leading_tokens = int("clip" in vision.model_type)

    def pixels(self, layout: ItemLayout) -> tuple[int, int] | None:
        return (self.model.config.vision_config.image_size,) * 2

    def tower_groups(self, patches: int, modality: str) -> Tensor:
        return torch.arange(patches, device="cpu")

    def pack(self, parts: list[Tensor], modality: str, call: dict[str, Any]) -> Tensor:
        return torch.cat(parts).flatten(0, 1)

    def pack_projector_input(self, parts: list[Tensor], modality: str, call: dict[str, Any]) -> Tensor:
        return self.pack(parts, modality, call)

    def resampled(self, modality: str, call: dict[str, Any], grids: list[tuple[int, int]]) -> dict[str, Any]:
        if (
            modality != "image" or call["pixel_values"].dim() != 4
        ):  # crops of a fixed size, in the families built on this
            return super().resampled(modality, call, grids)
        patch, (rows, columns) = self.model.config.vision_config.patch_size, grids[0]  # one size for all pictures
        pixels = resize(call["pixel_values"], rows * patch, columns * patch)
        given = {name: value for name, value in call.items() if name != "kwargs"}
        return {**given, "pixel_values": pixels, "interpolate_pos_encoding": True}

    def layouts(self, modality: str, call: dict[str, Any], lengths: list[int]) -> list[ItemLayout]:
        return [single_view(self.side, length // self.side) for length in lengths]
