# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT: a thumbnail, then the un-padded mosaic of crops with an ``image_newline`` after each row.

Maps and layouts go through the model's own packing as if they were features, so that no index arithmetic is repeated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, image_size_to_num_patches

from vtoken.adapters.llava import LlavaAdapter
from vtoken.context import NEWLINE, ItemLayout


class LlavaNextAdapter(LlavaAdapter):
    """`transformers.LlavaNextForConditionalGeneration`."""

    model_types = ("llava_next",)

    def _views(self, size: Tensor) -> int:
        config = self.model.config
        return image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)

    def _pack_views(self, views: list[Tensor], sizes: Tensor) -> list[Tensor]:
        """Per image (views, patches, C) -> (N, C) with NaN newlines, by the model's own function."""
        newline = torch.full((views[0].shape[-1],), float("nan"), device=views[0].device)
        packed, _ = self.outer.pack_image_features(
            views, sizes, vision_feature_select_strategy="full", image_newline=newline
        )
        return list(packed)

    def pack(self, parts: list[Tensor], modality: str, call: dict[str, Any]) -> Tensor:
        sizes = call["image_sizes"]
        views = torch.cat(parts).float().split([self._views(size) for size in sizes])
        return torch.cat(self._pack_views(list(views), sizes))

    def layouts(self, modality: str, call: dict[str, Any], lengths: list[int]) -> list[ItemLayout]:
        sizes = call["image_sizes"]
        return [self._layout(size, sizes[i : i + 1]) for i, size in enumerate(sizes)]

    def _layout(self, size: Tensor, sizes: Tensor) -> ItemLayout:
        views = self._views(size)
        index = torch.arange(self.side**2)
        place = torch.stack([index // self.side, index % self.side], 1).float().expand(views, -1, -1)
        view = torch.arange(views).float()[:, None, None].expand(-1, self.side**2, 1)
        packed = self._pack_views([torch.cat([view, place], 2)], sizes)[0]
        packed = torch.nan_to_num(packed, nan=NEWLINE).long()
        config = self.model.config
        crops = (0, 0)
        if views > 1:
            crops = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
        return ItemLayout(
            view=packed[:, 0],
            row=packed[:, 1].clamp(min=0),
            column=packed[:, 2].clamp(min=0),
            grids=((self.side, self.side),) * views,
            thumbnail=0,
            crops=(int(crops[0]), int(crops[1])),
            size=(int(size[0]), int(size[1])),
        )
