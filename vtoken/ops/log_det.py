# SPDX-License-Identifier: Apache-2.0
"""Greedy log-determinant of a kernel of squared similarities."""

from __future__ import annotations

import torch
from torch import Tensor

from vtoken.ops.common import counts, finite, mask_of
from vtoken.ops.cosines import CHUNK, DENSE
from vtoken.ops.ragged import gather
from vtoken.precision import selection


@selection
def log_det(x: Tensor, k: int | Tensor, gamma: float, valid: Tensor | None = None) -> Tensor:
    """Pick the set that maximises ``det`` of ``I + gamma G Gᵀ`` with ``G = x xᵀ`` (OTPrune, arXiv 2602.20205).

    Each pick has the largest variance given the picks before it, kept up to date by incremental Cholesky rows. No
    variance falls below 1, so that the rank is never used up. The kernel never exists as a whole, and G only where it
    is smaller than ``x``.

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
    x = finite(x, valid, "features")
    picked = count.new_full((len(count), int(count.max())), -1)
    rows = x.new_zeros(len(x), picked.shape[1], x.shape[1])  # of the Cholesky factor
    similar = _Similarities(x)
    left = (1 + gamma * similar.squared()).masked_fill(~valid, float("-inf"))
    for step in range(picked.shape[1]):
        best = left.argmax(1, keepdim=True)
        picked[:, step] = torch.where(step < count, best[:, 0], -1)
        column = gamma * similar.column(best)
        column.scatter_add_(1, best, torch.ones_like(column[:, :1]))
        seen = rows[:, :step]
        column = column - (seen.gather(2, best[..., None].expand(-1, step, 1)).mT @ seen)[:, 0]
        # a row that has no token left chooses among none: what is divided by is not used
        rows[:, step] = column / left.gather(1, best).clamp(min=1.0).sqrt()
        left = (left - rows[:, step].square()).scatter(1, best, float("-inf"))
    return picked


class _Similarities:
    """``G = x xᵀ`` and ``G Gᵀ`` of tokens (B, N, D), in parts where G is larger than they are."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.table = x @ x.mT if x.shape[1] <= min(x.shape[2], DENSE) else None

    def squared(self) -> Tensor:
        """(B, N): the diagonal of ``G Gᵀ``."""
        if self.table is not None:
            return self.table.square().sum(2)
        return torch.cat([(part @ self.x.mT).square().sum(2) for part in self.x.split(CHUNK, 1)], 1)

    def column(self, at: Tensor) -> Tensor:
        """(B, N): the columns ``at`` (B, 1) of ``G Gᵀ``."""
        if self.table is not None:
            return (self.table @ gather(self.table, at).mT)[..., 0]
        return (self.x @ (self.x.mT @ (self.x @ gather(self.x, at).mT)))[..., 0]
