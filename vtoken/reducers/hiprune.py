# SPDX-License-Identifier: Apache-2.0
"""HiPrune: what shallow layers look at, its surroundings, and what deep layers look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtoken.context import VisualContext
from vtoken.encoder import EncoderRead
from vtoken.ops import top_k
from vtoken.reducers.base import SelectReducer
from vtoken.reducers.checks import check_block, check_flag, check_number
from vtoken.reducers.encoded import EncoderReducer
from vtoken.reducers.views import Views, grid
from vtoken.registry import register


@register("hiprune")
@dataclass(frozen=True)
class HiPrune(EncoderReducer, SelectReducer):
    """HiPrune (arXiv 2508.00553): hierarchical attention of the vision tower.

    Anchors are the tokens that receive most attention in a middle layer, which looks at objects; they stay together
    with their four neighbours on the grid. The rest of the budget goes to the tokens that receive most in a deep layer.
    Each view gets the same budget. The authors take neighbours by raster index, so that those of a token at the edge
    lie on the other side of the picture; here they are on the grid. The [CLS] query is left out of the means.

    Parameters
    ----------
    alpha : float
        Share of the budget for anchors and neighbours.
    object_layer : int or float
        Block of the vision tower for anchors: its index, or a share of its depth. The authors' ninth of 24.
    layer : int or float
        Block for the rest.
    compat : bool
        Take neighbours by raster index.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """

    summary = "Anchors of a middle tower layer with their neighbours, then a deep layer."
    paper = "2508.00553"
    positions = "compact"
    reads = ("received",)

    alpha: float = 0.1
    object_layer: int | float = 0.34
    compat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, 0, 1)
        check_block("object_layer", self.object_layer)
        check_flag("compat", self.compat)

    def encoder_reads(self) -> tuple[EncoderRead, ...]:
        return EncoderRead("received", self.object_layer), *super().encoder_reads()

    def select(self, ctx: VisualContext, budget: Tensor) -> Tensor:
        """Slots (I, K): anchors, neighbours, then deep tokens of each view."""
        views = Views.of(ctx)
        layers = (self.object_layer, self.layer)
        shallow, deep = (views.take(self.read_scores(ctx, "received", layer)) for layer in layers)
        quota = views.share(budget, equal=True)
        places = [views.take(x) for x in grid(ctx)]
        anchors = self._anchors(shallow, quota, places, views.valid)
        return views.pick(anchors_first(anchors, deep, quota, views.valid))

    def _anchors(self, shallow: Tensor, quota: Tensor, places: list[Tensor], valid: Tensor) -> Tensor:
        index = top_k(shallow, (quota.float() * self.alpha / 5).round().long(), valid)
        if self.compat:
            return raster_neighbours(index, valid, int(places[1].max()) + 1)
        return grid_neighbours(index, places[0], places[1], valid)


def anchors_first(anchors: Tensor, deep: Tensor, k: Tensor, valid: Tensor) -> Tensor:
    """(B, max k) long: anchors (B, N) bool, then the others, each by ``deep`` (B, N), descending."""
    order = deep.masked_fill(~valid, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    order = order.gather(1, anchors.gather(1, order).to(torch.uint8).sort(dim=1, descending=True, stable=True).indices)
    return top_k(-order.argsort(dim=1).float(), k, valid)


def grid_neighbours(index: Tensor, row: Tensor, column: Tensor, valid: Tensor) -> Tensor:
    """(B, N) bool: tokens of ``index`` (B, K) and those above, below, left and right of them."""
    height, width = int(row.max()) + 3, int(column.max()) + 3
    cell = (row + 1) * width + column + 1
    marked = torch.zeros(len(row), height * width, dtype=torch.bool, device=row.device)
    picked = cell.gather(1, index.clamp(min=0)).masked_fill(index < 0, 0)  # cell 0 is outside of every view
    for offset in (0, 1, -1, width, -width):
        marked.scatter_(1, (picked + offset).clamp(min=0), True)
    return marked.gather(1, cell) & valid


def raster_neighbours(index: Tensor, valid: Tensor, width: int) -> Tensor:
    """(B, N) bool: tokens of ``index`` (B, K) and their raster neighbours, clamped to the range of indices."""
    last = (valid.sum(1, keepdim=True) - 1).clamp(min=0)
    marked = torch.zeros(len(valid), valid.shape[1] + 1, dtype=torch.bool, device=valid.device)
    for offset in (0, 1, -1, width, -width):
        near = torch.minimum((index + offset).clamp(min=0), last)
        marked.scatter_(1, near.masked_fill(index < 0, valid.shape[1]), True)
    return marked[:, :-1] & valid
