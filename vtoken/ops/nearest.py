# SPDX-License-Identifier: Apache-2.0
"""Greedy picks whose score falls with the largest similarity (or the sum of similarities) to the picks so far.

All scores only fall, except for sums, so that lazy evaluation applies. On a GPU with Triton, the picks of a pool are
made by one kernel.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vtoken.ops import triton_greedy
from vtoken.ops.cosines import Cosines
from vtoken.ops.lazy import Rival, best_of, lazy_greedy, on_host
from vtoken.ops.nested import nested_greedy, row_by_row


class _Pool:
    """Scores ``offset - slope * state`` of tokens with the similarities (B, P, P) among them.

    The state (B, P) is the largest similarity to a pick, or with ``add`` their sum.
    """

    def __init__(self, offset: Tensor, slope: Tensor, state: Tensor, table: Tensor, add: bool) -> None:
        self.offset, self.slope, self.state, self.table, self.add = offset, slope, state, table, add

    def scores(self) -> Tensor:
        return self.offset - self.slope * self.state

    def take(self, at: Tensor) -> None:
        columns = self.table.gather(1, at[..., None].expand(-1, -1, self.table.shape[2]))
        self.state = self.state + columns.sum(1) if self.add else torch.maximum(self.state, columns.amax(1))

    def fused(self, index: Tensor, free: Tensor, rival: Rival, left: Tensor, most: int) -> Tensor | None:
        if not triton_greedy.available(self.table.device):
            return None
        scores = self.offset, self.slope, self.state
        picks, served = triton_greedy.serve(self.table, *scores, free, index, *rival, left, most, self.add)
        return picks[:, : int(served.min())]  # the one sync of a pool

    def row(self) -> _Row:
        return _Row(self)


class _Row:
    """The same of one row, in numpy."""

    def __init__(self, pool: _Pool) -> None:
        self.offset, self.slope, self.state, self.table = (
            every[0].numpy() for every in (pool.offset, pool.slope, pool.state, pool.table)
        )
        self.join = np.add if pool.add else np.maximum

    def scores(self) -> np.ndarray:
        return self.offset - self.slope * self.state

    def take(self, at: int) -> None:
        self.state = self.join(self.state, self.table[at])


class _Bounds:
    """The same scores of all tokens."""

    def __init__(self, cosines: Cosines, offset: Tensor, slope: Tensor, state: Tensor, add: bool) -> None:
        self.cosines, self.offset, self.slope, self.state, self.add = cosines, offset, slope, state, add

    def scores(self) -> Tensor:
        return self.offset - self.slope * self.state

    def pool(self, index: Tensor) -> _Pool:
        return _Pool(*self._of(index), self.cosines.among(index), self.add)

    def narrow(self, index: Tensor) -> _Bounds:
        return _Bounds(self.cosines.part(0, index[0]), *self._of(index), self.add)

    def _of(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.offset.gather(1, index), self.slope.gather(1, index), self.state.gather(1, index)

    def catch_up(self, picks: Tensor, pool: object) -> None:
        new = seen_from(self.cosines, picks, self.add)
        self.state = self.state + new if self.add else torch.maximum(self.state, new)


def seen_from(cosines: Cosines, picks: Tensor, add: bool) -> Tensor:
    """(B, N): the largest similarity of each token to the ``picks`` (B, P), or their sum."""
    columns = cosines.columns(picks)
    return columns.sum(1) if add else columns.amax(1)


def pick(
    cosines: Cosines,
    k: Tensor,
    valid: Tensor,
    first: Tensor,
    offset: Tensor | None = None,
    slope: Tensor | None = None,
    parallel: int = 1,
    add: bool = False,
    short: int = 0,
) -> Tensor:
    """Picks (B, max k): the best by ``first`` (B, N), then by ``offset - slope * state`` (default: ``-state``).

    ``add`` takes all similarities into memory: sums rise and fall, so nothing outside of a pool would be bounded.
    So does, on the host, a row of at most ``short`` tokens.
    """
    offset = torch.zeros_like(first) if offset is None else offset
    slope = torch.ones_like(first) if slope is None else slope

    def select(cosines: Cosines, k: Tensor, valid: Tensor, first: Tensor, offset: Tensor, slope: Tensor) -> Tensor:
        picked = k.new_full((len(k), int(k.max())), -1)
        begin = min(parallel, picked.shape[1])
        if not begin:
            return picked
        picks = best_of(first.masked_fill(~valid, float("-inf")), begin)
        picked[:, :begin] = torch.where(torch.arange(begin, device=k.device) < k[:, None], picks, -1)
        if begin == picked.shape[1]:
            return picked
        free = valid.clone().scatter_(1, picks, False)
        bounds = _Bounds(cosines, offset, slope, seen_from(cosines, picks, add), add)
        width = valid.shape[1] if add or cosines.table is not None else 0
        if not on_host(k.device):
            return lazy_greedy(bounds, k, free, picked, begin, parallel, width)
        picked[:, begin:] = nested_greedy(bounds, free, picked.shape[1] - begin, parallel, width)
        return picked

    return row_by_row(select, cosines, k, valid, first, offset, slope, short=short)


def only(start: Tensor, like: Tensor) -> Tensor:
    """(B, N) scores that put ``start`` (B,) first."""
    return torch.zeros_like(like, dtype=torch.float32).scatter_(1, start[:, None], 1.0)
