# SPDX-License-Identifier: Apache-2.0
"""Which query rows of a batch are computed together, and which keys they see.

Who may see whom at all is asked of `vtoken.engine.masks`.

B rows, S tokens that the layer works on, K keys (cached ones first).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from vtoken.context import ItemTable
from vtoken.engine.light.neighbours import bands, neighbours
from vtoken.ops.ragged import compact, gather, spread

if TYPE_CHECKING:
    from vtoken.engine.prefill import Group

See = Callable[[Tensor], Tensor]
"""Query rows (B, R) long to the keys that each may see: (B, R, K) bool."""


@dataclass(frozen=True)
class RowPlan:
    """Query rows that share all keys of their batch row.

    Parameters
    ----------
    here : Tensor
        (B, S) bool: the rows.
    index, valid : Tensor
        (B, R): the same, right aligned.
    seen : Tensor
        (B, 1, R, K) bool.
    """

    here: Tensor
    index: Tensor
    valid: Tensor
    seen: Tensor

    @classmethod
    def of(cls, here: Tensor, see: See) -> RowPlan:
        """All keys that the rows ``here`` may see."""
        index, valid = compact(here)
        return cls(here, index, valid, _something(see(index))[:, None])


@dataclass(frozen=True)
class BandPlan:
    """Query rows in Q blocks of T; the C keys of a block are the neighbours of its rows and what is no visual token.

    Parameters
    ----------
    here : Tensor
        (B, S) bool: the rows.
    index, valid : Tensor
        (B, Q * T): the same, right aligned before the filling of the last block.
    columns : Tensor
        (B, Q, C) long: the keys.
    seen : Tensor
        (B * Q, 1, T, C) bool.
    """

    here: Tensor
    index: Tensor
    valid: Tensor
    columns: Tensor
    seen: Tensor

    @classmethod
    def of(cls, here: Tensor, cells: tuple[Tensor, Tensor, Tensor], window: int, see: See) -> BandPlan:
        """Rows ``here`` see each other within ``window`` cells, and other keys as they may.

        ``cells`` are the view, the row and the column (B, S) of each token.
        """
        index, valid = compact(here)
        seen, n = see(index) & valid[..., None], index.shape[1]
        past = seen.shape[2] - here.shape[1]
        places = index + past
        visual = pad(here, (past, 0))
        view, row, column = (gather(cell, index) for cell in cells)
        close = neighbours(view, row, column, window) & valid[:, None] & valid[..., None]
        close &= seen.gather(2, places[:, None].expand(-1, n, -1))
        queries, keys = bands(close)
        blocks, size = queries.shape
        near = torch.zeros_like(seen).scatter_(2, places[:, None].expand(-1, n, -1), close)
        seen = torch.where(visual[:, None], near, seen)
        common, real = compact(seen.any(1) & ~visual)
        columns = torch.cat([_blocks(common, blocks), places[:, keys]], 2)
        real = torch.cat([_blocks(real, blocks), valid[:, keys]], 2)
        room = (0, blocks * size - n)
        seen = pad(seen, (0, 0, *room)).unflatten(1, (blocks, size))
        seen = seen.gather(3, columns[:, :, None].expand(-1, -1, size, -1)) & real[:, :, None]
        return cls(here, pad(index, room), pad(valid, room), columns, _something(seen.flatten(0, 1))[:, None])


def grid_cells(group: Group, table: ItemTable) -> tuple[Tensor, Tensor, Tensor]:
    """View (numbered through the batch, -1 without one), row and column (B, S) of every token."""
    item, slot = group.item, group.slot
    row, column = (
        spread(pad_sequence([getattr(layout, name) for layout in table.layouts], True).to(item.device), item, slot)
        for name in ("row", "column")
    )
    most = max(len(layout.grids) for layout in table.layouts)
    view = spread(table.view.to(item.device), item, slot, -1)
    return torch.where(view >= 0, view + item * most, -1), row, column


def _something(seen: Tensor) -> Tensor:
    """Rows that see nothing (padding) see everything: a softmax over nothing is not a number."""
    return seen | ~seen.any(-1, keepdim=True)


def _blocks(x: Tensor, blocks: int) -> Tensor:
    return x[:, None].expand(-1, blocks, -1)
