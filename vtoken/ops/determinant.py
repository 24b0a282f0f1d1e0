# SPDX-License-Identifier: Apache-2.0
"""Greedy sets of large determinant: each pick has the largest variance given the picks before it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vtoken.ops.common import counts, finite, first_picks, mask_of
from vtoken.ops.cosines import CHUNK, Cosines
from vtoken.ops.loop import one_thread, row_by_row
from vtoken.ops.ragged import gather
from vtoken.precision import selection

RANK_EPS = 1e-6  # conditional variance, relative to the token's own, below which float32 holds only rounding


@selection
def dpp(features: Tensor, relevance: Tensor, k: int | Tensor, valid: Tensor | None = None) -> Tensor:
    """Pick the set that maximises ``det`` of the kernel ``diag(r) cos(features) diag(r)`` (CDPruner, arXiv 2506.10967).

    Each pick has the largest variance given the picks before it, kept up to date by incremental Cholesky rows. Once
    the kernel's rank is used up, the remaining tokens come in order of relevance.

    Parameters
    ----------
    features : Tensor
        (B, N, D).
    relevance : Tensor
        (B, N).
    k : int or Tensor
        How many, or (B,) long; more than there are valid tokens means all of them.
    valid : Tensor, optional
        (B, N) bool: tokens to choose from.

    Returns
    -------
    Tensor
        (B, max k) long in pick order, padded with -1.

    Raises
    ------
    ValueError
        If a feature or a relevance is not finite, or ``k`` is negative.
    """
    valid = mask_of(features, valid)
    count = counts(k, valid)
    cosines, relevance = Cosines(features, valid), finite(relevance, valid, "relevance scores")
    return row_by_row(_by_relevance, cosines, count, valid, relevance)


def _by_relevance(cosines: Cosines, k: Tensor, valid: Tensor, relevance: Tensor) -> Tensor:
    cosines = cosines.whole()
    own = relevance.square() * cosines.nonzero  # exactly: equal relevance is a tie
    spent = own - own.amax(1, keepdim=True) - 1.0  # relevance decides, below all others

    def column(at: Tensor) -> Tensor:
        return relevance.gather(1, at) * cosines.columns(at)[:, 0] * relevance

    with one_thread(k.device, cosines.read):
        return _pick(column, k, valid, own, RANK_EPS * own, spent)


@selection
def log_det(x: Tensor, k: int | Tensor, gamma: float, valid: Tensor | None = None) -> Tensor:
    """Pick the set that maximises ``det`` of ``I + gamma G Gᵀ`` with ``G = x xᵀ`` (OTPrune, arXiv 2602.20205).

    Each pick has the largest variance given the picks before it, kept up to date by incremental Cholesky rows. No
    variance falls below 1, so that the rank is never used up. The kernel exists as a whole only where it is no larger
    than ``x``.

    Parameters
    ----------
    x : Tensor
        (B, N, D).
    k : int or Tensor
        How many, or (B,) long; more than there are valid tokens means all of them.
    gamma : float
        Positive.
    valid : Tensor, optional
        (B, N) bool: tokens to choose from; others have no part in G.

    Returns
    -------
    Tensor
        (B, max k) long in pick order, padded with -1.

    Raises
    ------
    ValueError
        If a feature is not finite, or ``k`` is negative.
    """
    valid = mask_of(x, valid)
    count = counts(k, valid)
    kernel = _Kernel(finite(x, valid, "features"))
    left = 1 + gamma * kernel.diagonal()

    def column(at: Tensor) -> Tensor:
        found = gamma * kernel.column(at)
        return found.scatter_add_(1, at, torch.ones_like(found[:, :1]))

    with one_thread(valid.device, kernel.read):
        return _pick(column, count, valid, left, torch.zeros_like(left), left)


def _pick(
    column: Callable[[Tensor], Tensor], k: Tensor, valid: Tensor, left: Tensor, floor: Tensor, spent: Tensor
) -> Tensor:
    """Picks (B, max k) by the variances ``left`` (B, N), and by ``spent`` where they are not above ``floor``.

    ``column(at)`` gives the columns ``at`` (B, 1) of the kernels as (B, N).
    """
    picked = k.new_full((len(k), int(k.max())), -1)
    rows = left.new_zeros(len(k), picked.shape[1], left.shape[1])  # of the Cholesky factor
    closed = torch.zeros_like(left).masked_fill_(~valid, float("-inf"))
    for step in range(picked.shape[1]):
        best = (torch.where(left > floor, left, spent) + closed).argmax(1, keepdim=True)
        picked[:, step : step + 1] = best
        closed.scatter_(1, best, float("-inf"))
        variance, seen = left.gather(1, best), rows[:, :step]
        new = column(best) - (seen.gather(2, best[..., None].expand(-1, step, 1)).mT @ seen)[:, 0]
        fresh = variance > floor.gather(1, best)
        rows[:, step] = torch.where(fresh, new / variance.clamp(min=1e-30).sqrt(), 0.0)
        left = left - rows[:, step].square()
    return first_picks(picked, k)


class _Kernel:
    """``G Gᵀ`` with ``G = x xᵀ`` of tokens (B, N, D): a table where it is no larger than they are, else columns."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.table: Tensor | None = None
        if x.shape[1] <= x.shape[2]:
            gram = x @ x.mT
            self.table = gram @ gram
        self.read = x.shape[1] if self.table is not None else x.numel()  # numbers read for a column

    def diagonal(self) -> Tensor:
        """(B, N)."""
        if self.table is not None:
            return self.table.diagonal(dim1=1, dim2=2).clone()
        return torch.cat([(part @ self.x.mT).square().sum(2) for part in self.x.split(CHUNK, 1)], 1)

    def column(self, at: Tensor) -> Tensor:
        """(B, N): the columns ``at`` (B, 1)."""
        if self.table is not None:
            return gather(self.table, at)[:, 0]
        return (self.x @ (self.x.mT @ (self.x @ gather(self.x, at).mT)))[..., 0]
