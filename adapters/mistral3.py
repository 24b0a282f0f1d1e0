# SPDX-License-Identifier: Apache-2.0
"""Mistral 3 with Pixtral: pictures of any size in one packed sequence, k x k patches to a token, breaks as text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from vtoken.adapters.base import Adapter, single_view
from vtoken.context import ItemLayout


class Mistral3Adapter(Adapter):
    """`transformers.Mistral3ForConditionalGeneration`."""

    model_types = ("mistral3",)

    @property
    def cell(self) -> int:
        """Pixels per token and axis."""
        return self.model.config.vision_config.patch_size * self.model.config.spatial_merge_size

    def pixels(self, layout: ItemLayout) -> tuple[int, int] | None:
        rows, columns = layout.grids[0]
        return rows * self.cell, columns * self.cell

    def layouts(self, modality: str, call: dict[str, Any], lengths: list[int]) -> list[ItemLayout]:
        sizes = call["image_sizes"]
        return [single_view(int(height) // self.cell, int(width) // self.cell) for height, width in sizes]

    def pack(self, parts: list[Tensor], modality: str, call: dict[str, Any]) -> Tensor:
        merge, patch = self.model.config.spatial_merge_size, self.model.config.vision_config.patch_size
        grids = [(int(height) // patch, int(width) // patch) for height, width in call["image_sizes"]]
        pictures = torch.cat(parts).flatten(0, 1).split([rows * columns for rows, columns in grids])
        cells = [
            avg_pool2d(x.unflatten(0, grid).permute(2, 0, 1), merge) for x, grid in zip(pictures, grids, strict=True)
        ]
        return torch.cat([x.flatten(1).mT for x in cells])
