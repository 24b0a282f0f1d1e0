# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT: a thumbnail, then the un-padded mosaic of crops with an ``image_newline`` after each row.

Maps and layouts go through the model's own packing as if they were features, so that no index arithmetic is repeated.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, image_size_to_num_patches

from vtoken.adapters.base import grid_shares
from vtoken.adapters.llava import LlavaAdapter, one_number
from vtoken.context import NEWLINE, ItemLayout


class LlavaNextAdapter(LlavaAdapter):
    """`transformers.LlavaNextForConditionalGeneration`."""

    model_types = ("llava_next",)

    def pixels(self, layout: ItemLayout) -> tuple[int, int] | None:
        return (one_number(self.model.config.vision_config.image_size),) * 2

    def item_lengths(self, features: list[Tensor], call: dict[str, Any]) -> list[int]:
        return [len(entry) for entry in features]

    def _views(self, size: Tensor) -> int:
        config = self.model.config
        return image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)

    def _crops(self, size: Tensor) -> tuple[int, int]:
        config = self.model.config
        grid = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
        return int(grid[0]), int(grid[1])

    def _view_counts(self, call: dict[str, Any]) -> list[int]:
        return [self._views(size) for size in call["image_sizes"]]

    def _pack_views(self, views: list[Tensor], sizes: Tensor, call: dict[str, Any]) -> list[Tensor]:
        """Per image (views, patches, C) -> (N, C) with NaN newlines, by the model's own function."""
        newline = torch.full((views[0].shape[-1],), float("nan"), dtype=torch.float32, device=views[0].device)
        packed, _ = self.outer.pack_image_features(
            views, sizes, vision_feature_select_strategy="full", image_newline=newline
        )
        return list(packed)

    def pack(self, parts: list[Tensor], modality: str, call: dict[str, Any]) -> Tensor:
        views = torch.cat(parts).float().split(self._view_counts(call))
        return torch.cat(self._pack_views(list(views), call["image_sizes"], call))

    def layouts(self, modality: str, call: dict[str, Any], lengths: list[int]) -> list[ItemLayout]:
        counts = self._view_counts(call)
        return [self._layout(views, call["image_sizes"][i : i + 1], call) for i, views in enumerate(counts)]

    def _layout(self, views: int, sizes: Tensor, call: dict[str, Any]) -> ItemLayout:
        size, side = sizes[0], self.side
        crops = self._crops(size) if views > 1 else (0, 0)
        packed = self._pack_views([self._places(views, crops[1])], sizes, call)[0]
        newline = packed[:, 0].isnan()
        base = torch.arange(len(packed), device="cpu") < side**2
        y, x = (packed + 0.5).nan_to_num(0.0).long().unbind(1)  # interpolated places: the nearest patch
        view = torch.where(base, 0, 1 + y // side * crops[1] + x // side)
        return ItemLayout(
            view=torch.where(newline, NEWLINE, view),
            row=torch.where(newline, 0, y % side),
            column=torch.where(newline, 0, x % side),
            grids=((side, side),) * views,
            thumbnail=0,
            crops=crops,
            size=(int(size[0]), int(size[1])),
            box=functools.partial(self._boxes, packed, base, size, crops),
        )

    def _boxes(self, packed: Tensor, base: Tensor, size: Tensor, crops: tuple[int, int]) -> Tensor:
        """(N, 4) shares of the picture; the mosaic shows it scaled to fit and centred on a canvas of all crops."""
        whole = grid_shares(packed[:, 0], packed[:, 1], self.side, self.side)
        if crops == (0, 0):
            return whole
        scale = min(self.side * crops[i] / float(size[i]) for i in (0, 1))  # patches per pixel
        low, high = [], []
        for axis in (0, 1):
            middle = packed[:, axis] + 0.5
            lines = middle[~base & ~middle.isnan()].unique()
            step = float(lines.diff().mean()) if len(lines) > 1 else 1.0
            shown = scale * float(size[axis])
            start = (self.side * crops[axis] - shown) / 2
            low.append(((middle - step / 2 - start) / shown).clamp(0, 1))
            high.append(((middle + step / 2 - start) / shown).clamp(0, 1))
        mosaic = torch.stack([low[1], low[0], high[1], high[0]], 1)
        return torch.where(base[:, None], whole, mosaic)

    def _places(self, views: int, columns: int) -> Tensor:
        """(views, patches, 2) row and column of each patch: in the thumbnail, or in the mosaic of all crops."""
        index = torch.arange(self.side**2, device="cpu")
        place = torch.stack([index // self.side, index % self.side], 1).expand(views, -1, -1).clone()
        if views > 1:
            crop = torch.arange(views - 1, device="cpu")
            place[1:] += self.side * torch.stack([crop // columns, crop % columns], 1)[:, None]
        return place.float()
