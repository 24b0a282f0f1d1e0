# SPDX-License-Identifier: Apache-2.0
"""A smaller picture instead of fewer tokens of the large one: the control that every reducer has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtoken.budget import budget
from vtoken.context import Cut, ItemLayout, VisualContext
from vtoken.reducers.base import KeepReducer
from vtoken.registry import register


@register("downsample")
@dataclass(frozen=True)
class Downsample(KeepReducer):
    """Lower the resolution of the picture until it has no more tokens than the budget allows.

    The picture is resized and encoded by the model's own tower, with interpolated position embeddings where the tower
    has a fixed grid. Its tokens take the places, and position ids, of the tokens of the large picture that are nearest.
    The grid is the picture's shape as nearly as possible, so that a few tokens of the budget may stay unused. The large
    picture is encoded too, because the prompt is made for it: this is a control of accuracy, not of time.

    Families that cut pictures into views of a fixed size, and clips, are refused.

    Raises
    ------
    ValueError
        If ``keep`` is out of range, or the model cannot encode a smaller picture.
    """

    summary = "The picture at a lower resolution (control)."

    def picture_grid(self, layout: ItemLayout) -> tuple[int, int]:
        tokens = torch.tensor([len(layout.view)], device="cpu")
        return smaller_grid(*layout.grids[0], int(budget(self.keep, tokens)))

    def before_llm(self, ctx: VisualContext) -> Cut | None:
        """Write the tokens of the small pictures over the nearest ones of the large pictures."""
        keep, features = torch.zeros_like(ctx.valid), ctx.features.clone()
        for item, (layout, small) in enumerate(zip(ctx.layouts, ctx.resampled, strict=True)):
            slots = nearest_slots(layout, small.shape[0], small.shape[1]).to(keep.device)
            keep[item, slots] = True
            features[item, slots] = small.flatten(0, 1).to(features.dtype)
        return Cut(keep, features)


def smaller_grid(rows: int, columns: int, most: int) -> tuple[int, int]:
    """The grid of at most ``most`` cells that is nearest to the shape of rows x columns.

    >>> smaller_grid(24, 24, 64), smaller_grid(12, 12, 14), smaller_grid(4, 30, 7)
    ((8, 8), (4, 3), (1, 7))
    """
    high = min(max(1, round((most * rows / columns) ** 0.5)), rows, most)
    wide = min(most // high, columns)
    return min(rows, most // wide), wide


def nearest_slots(layout: ItemLayout, rows: int, columns: int) -> Tensor:
    """(rows * columns,) long: the token of a full grid at the centre of each cell of a coarser one, in raster order."""
    high, wide = layout.grids[0]
    row, column = (
        ((torch.arange(cells, dtype=torch.float32, device="cpu") + 0.5) * extent / cells).long()
        for cells, extent in ((rows, high), (columns, wide))
    )
    slot = torch.empty(high, wide, dtype=torch.long, device="cpu")
    slot[layout.row, layout.column] = torch.arange(len(layout.view), device="cpu")
    return slot[row[:, None], column].flatten()
