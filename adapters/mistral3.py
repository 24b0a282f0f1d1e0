# SPDX-License-Identifier: Apache-2.0
"""Mistral 3 with Pixtral: pictures of any size in one packed sequence, k x k patches to a token, breaks as text."""

from __future__ import annotations

from typing import Any

from vtoken.adapters.base import Adapter, single_view
from vtoken.context import ItemLayout


class Mistral3Adapter(Adapter):
    """`transformers.Mistral3ForConditionalGeneration`."""

    model_types = ("mistral3",)

    def layouts(self, modality: str, call: dict[str, Any], lengths: list[int]) -> list[ItemLayout]:
        cell = self.model.config.vision_config.patch_size * self.model.config.spatial_merge_size
        return [single_view(int(height) // cell, int(width) // cell) for height, width in call["image_sizes"]]
