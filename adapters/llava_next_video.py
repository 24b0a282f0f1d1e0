# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT-Video: images as in LLaVA-NeXT, frames pooled before the projector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from vtoken.adapters.base import equal_views, square_groups
from vtoken.adapters.llava_next import LlavaNextAdapter
from vtoken.compat import clip_pixels
from vtoken.context import ItemLayout


class LlavaNextVideoAdapter(LlavaNextAdapter):
    """`transformers.LlavaNextVideoForConditionalGeneration`."""

    model_types = ("llava_next_video",)

    def tower_groups(self, patches: int, modality: str) -> Tensor:
        return square_groups(patches, self.model.config.spatial_pool_stride if modality == "video" else 1)

    def pack(self, parts: list[Tensor], modality: str, call: dict[str, Any]) -> Tensor:
        if modality == "image":
            return super().pack(parts, modality, call)
        grid = torch.cat(parts).float().unflatten(1, (self.side, self.side))
        pooled = avg_pool2d(grid.permute(0, 3, 1, 2), self.model.config.spatial_pool_stride)
        return pooled.permute(0, 2, 3, 1).flatten(0, 2)

    def pack_projector_input(self, parts: list[Tensor], modality: str, call: dict[str, Any]) -> Tensor:
        if modality == "image":
            return super().pack_projector_input(parts, modality, call)
        return torch.cat(parts).flatten(0, 1)

    def layouts(self, modality: str, call: dict[str, Any], lengths: list[int]) -> list[ItemLayout]:
        if modality == "image":
            return super().layouts(modality, call, lengths)
        frames, side = clip_pixels(call).shape[1], self.side // self.model.config.spatial_pool_stride
        return [equal_views(frames, side, side)] * len(lengths)
