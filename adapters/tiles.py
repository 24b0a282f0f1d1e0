# SPDX-License-Identifier: Apache-2.0
"""Families that show a picture as square tiles and pool k x k patches into a token (k = 1: one token per patch)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from vtoken.adapters.base import Adapter, equal_views, square_groups, square_side
from vtoken.context import ItemLayout


class TilesAdapter(Adapter):
    """Gemma 3, PaliGemma, Aya Vision, Cohere2 Vision, Idefics 3 and SmolVLM: SigLIP towers, one item per tile.

    Their processors put text between the tiles of a picture (rows, columns, separators), so each tile is an item.
    """

    model_types: ClassVar[tuple[str, ...]] = (
        "gemma3",
        "paligemma",
        "aya_vision",
        "cohere2_vision",
        "idefics3",
        "smolvlm",
    )
    one_to_one: ClassVar[tuple[str, ...]] = ("paligemma",)

    def __init__(self, model) -> None:
        super().__init__(model)
        vision = model.config.vision_config
        size, patch = (x[0] if isinstance(x, (list, tuple)) else x for x in (vision.image_size, vision.patch_size))
        self.size, self.side = size, size // patch
        self.token_side = square_side(self._tokens_per_tile())

    def _tokens_per_tile(self) -> int:
        config = self.model.config
        if (tokens := getattr(config, "mm_tokens_per_image", None)) is not None:
            return tokens
        factor = getattr(config, "downsample_factor", None) or getattr(config, "scale_factor", None) or 1
        return (self.side // factor) ** 2

    def pixels(self, layout: ItemLayout) -> tuple[int, int] | None:
        return self.size, self.size

    def item_lengths(self, features: list[Tensor], call: dict[str, Any]) -> list[int]:
        tokens = self.token_side**2
        return [tokens] * (sum(len(entry) for entry in features) // tokens)

    def tower_groups(self, patches: int, modality: str) -> Tensor:
        return square_groups(patches, self.side // self.token_side)

    def pack(self, parts: list[Tensor], modality: str, call: dict[str, Any]) -> Tensor:
        grid = torch.cat(parts).float().unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        return avg_pool2d(grid, self.side // self.token_side).permute(0, 2, 3, 1).flatten(0, 2)

    def pack_projector_input(self, parts: list[Tensor], modality: str, call: dict[str, Any]) -> Tensor:
        if self.model.config.model_type in self.one_to_one:
            return torch.cat(parts).flatten(0, 1)
        return super().pack_projector_input(parts, modality, call)

    def layouts(self, modality: str, call: dict[str, Any], lengths: list[int]) -> list[ItemLayout]:
        return [equal_views(1, self.token_side, self.token_side)] * len(lengths)
