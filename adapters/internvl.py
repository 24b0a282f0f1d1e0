# SPDX-License-Identifier: Apache-2.0
"""InternVL (transformers' own classes): tiles of 2 x 2 pooled patches, the thumbnail last.

The model is not told which tiles form a picture. The prompt is: the tiles of one picture are one unbroken run of
placeholders, which becomes one item with a view per tile. How the tiles are arranged is known to the processor only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtoken.adapters.base import equal_views, grid_shares
from vtoken.adapters.tiles import TilesAdapter
from vtoken.context import ItemLayout
from vtoken.ops.ragged import run_lengths

if TYPE_CHECKING:
    from vtoken.engine.tower import VisionRecord


class InternVLAdapter(TilesAdapter):
    """`transformers.InternVLForConditionalGeneration`."""

    model_types = ("internvl",)

    def _tokens_per_tile(self) -> int:
        return int(self.side * self.model.config.downsample_ratio) ** 2

    def pack_projector_input(self, parts: list[Tensor], modality: str, call: dict[str, Any]) -> Tensor:
        return torch.cat(parts).flatten(0, 1)  # shuffled before the projector: one row per token already

    def shares(self, layout: ItemLayout, size: tuple[int, int] | None) -> Tensor:
        return tile_shares(layout, size)

    def regroup(self, record: VisionRecord, here: Tensor) -> VisionRecord:
        return join_tiles(record, here, self.token_side)


def join_tiles(record: VisionRecord, here: Tensor, side: int) -> VisionRecord:
    """One item per run of placeholders: its tiles are views, the last of several is the thumbnail."""
    tiles = [length // side**2 for length in run_lengths(here)]
    layouts = [equal_views(count, side, side) for count in tiles]
    layouts = [
        replace(layout, thumbnail=count - 1) if count > 1 else layout
        for layout, count in zip(layouts, tiles, strict=True)
    ]
    return replace(record, lengths=[count * side**2 for count in tiles], layouts=layouts)


def tile_shares(layout: ItemLayout, size: tuple[int, int] | None) -> Tensor:
    """Shares of the picture, of (height, width) ``size``, whose tiles are arranged as InternVL's processor does.

    Raises
    ------
    ValueError
        If the size is needed and unknown.
    """
    (rows, columns), tiles = layout.grids[0], len(layout.grids) - 1
    whole = grid_shares(layout.row, layout.column, rows, columns)
    if tiles < 1:
        return whole
    if size is None:
        raise ValueError(
            "How the tiles of a picture are arranged depends on its size, which this model is not told: pass "
            "sizes=[(height, width), ...], one for each image."
        )
    wanted = size[1] / size[0]
    across = min((n for n in range(1, tiles + 1) if tiles % n == 0), key=lambda n: abs(wanted - n * n / tiles))
    row, column = layout.view // across * rows + layout.row, layout.view % across * columns + layout.column
    inside = grid_shares(row, column, tiles // across * rows, across * columns)
    return torch.where((layout.view == tiles)[:, None], whole, inside)
