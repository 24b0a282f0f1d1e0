# SPDX-License-Identifier: Apache-2.0
"""Mistral 3 with Pixtral: pictures of any size in one packed sequence, k x k patches to a token, breaks as text."""

from __future__ import annotations

from typing import Any

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
