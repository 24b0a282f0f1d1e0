# SPDX-License-Identifier: Apache-2.0
"""Average pooling on the grid of each view: the control for every method that merges."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtoken.budget import share_out
from vtoken.context import VisualContext
from vtoken.reducers.base import Assignment, MergeReducer
from vtoken.reducers.views import Views, grid
from vtoken.registry import register


@register("pooled")
@dataclass(frozen=True)
class Pooled(MergeReducer):
    """Average the tokens of each cell of a coarser grid.

    The budget is split over the views by their size. A view of h x w tokens that may keep k of them is cut into
    horizontal bands, each band into cells of equal token counts, so that the cells are about square and exactly k. The
    mean of a cell replaces the token nearest to its centre.

    Raises
    ------
    ValueError
        If ``keep`` is out of range.
    """

    summary = "Average pooling on the grid of each view (control)."

    def assign(self, ctx: VisualContext, budget: Tensor) -> Assignment:
        """Send each token to the one at the centre of its cell."""
        views = Views.of(ctx)
        row, column = (views.take(x) for x in grid(ctx))
        cell = cells(row, column, views.valid, views.share(budget))
        return Assignment(views.scatter(_centres(row, column, cell), ctx.longest))


def cells(row: Tensor, column: Tensor, valid: Tensor, k: Tensor) -> Tensor:
    """Partition the tokens of each view into ``k`` cells.

    Parameters
    ----------
    row, column : Tensor
        (G, M) long: places in the grid.
    valid : Tensor
        (G, M) bool.
    k : Tensor
        (G,) long: at most the valid tokens of the view.

    Returns
    -------
    Tensor
        (G, M) long in [0, k), -1 for tokens that are in no cell.
    """
    top, height = _span(row, valid)
    _, width = _span(column, valid)
    bands = ((k * height).float() / width).sqrt().round().long()
    bands = torch.maximum(bands, -(-k // width)).clamp(min=1)
    bands = torch.minimum(bands, torch.minimum(height, k.clamp(min=1)))
    band = torch.where(valid, (row - top[:, None]) * bands[:, None] // height[:, None], int(bands.max()))
    count = torch.zeros(len(k), int(bands.max()) + 1, dtype=torch.long, device=k.device)
    count.scatter_add_(1, band, torch.ones_like(band))
    quota = torch.zeros_like(count)
    quota[:, :-1] = share_out(k, count[:, :-1], count[:, :-1])
    order = column.sort(dim=1, stable=True).indices
    order = order.gather(1, band.gather(1, order).sort(dim=1, stable=True).indices)
    rank = order.argsort(dim=1) - (count.cumsum(1) - count).gather(1, band)
    mine = quota.gather(1, band)
    inside = rank * mine // count.gather(1, band).clamp(min=1)
    return torch.where(mine > 0, (quota.cumsum(1) - quota).gather(1, band) + inside, -1)


def _span(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """First value and extent (G,) of the valid entries of (G, M)."""
    low = x.masked_fill(~valid, torch.iinfo(x.dtype).max).amin(1)
    high = x.masked_fill(~valid, -1).amax(1)
    low = torch.minimum(low, high.clamp(min=0))
    return low, (high - low + 1).clamp(min=1)


def _centres(row: Tensor, column: Tensor, cell: Tensor) -> Tensor:
    """(G, M) long: index of the token nearest to the centre of the cell of each token, -1 outside of the cells."""
    number = int(cell.max()) + 2
    index = torch.where(cell < 0, number - 1, cell)
    place = torch.stack([row, column], 2).float()
    total = place.new_zeros(len(cell), number, 2).scatter_add_(1, index[..., None].expand_as(place), place)
    size = place.new_zeros(len(cell), number).scatter_add_(1, index, torch.ones_like(place[..., 0]))
    middle = (total / size.clamp(min=1)[..., None]).gather(1, index[..., None].expand_as(place))
    gap = (place - middle).square().sum(2)
    least = gap.new_full((len(cell), number), float("inf")).scatter_reduce_(1, index, gap, "amin")
    nearest = gap <= least.gather(1, index)
    tokens = torch.arange(cell.shape[1], device=cell.device).expand_as(cell)
    first = tokens.new_full((len(cell), number), cell.shape[1])
    first.scatter_reduce_(1, index, torch.where(nearest, tokens, cell.shape[1]), "amin")
    return first.gather(1, index).masked_fill(cell < 0, -1)
