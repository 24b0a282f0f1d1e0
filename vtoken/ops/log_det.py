# SPDX-License-Identifier: Apache-2.0
"""Greedy log-determinant of a kernel of squared similarities."""

from __future__ import annotations

import torch
from torch import Tensor

from vtoken.ops.common import counts, finite, mask_of
from vtoken.ops.cosines import CHUNK
from vtoken.precision import selection


@selection
def log_det(x: Tensor, k: int | Tensor, gamma: float, valid: Tensor | None = None) -> Tensor:
    """Pick the set that maximises ``det`` of ``I + gamma G Gᵀ`` with ``G = x xᵀ`` (OTPrune, arXiv 2602.20205).

    Each pick has the largest variance given the picks before it, kept up to date by incremental Cholesky rows. No
    variance falls below 1, so that the rank is never used up. Columns of the kernel are products with ``x``: neither
    it nor G exists as a whole.

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
    left = (1 + gamma * _squared_similarities(x)).masked_fill(~valid, float("-inf"))
    for step in range(picked.shape[1]):
        best = left.argmax(1, keepdim=True)
        picked[:, step] = torch.where(step < count, best[:, 0], -1)
        at = best[..., None]
        column = gamma * (x @ (x.mT @ (x @ x.gather(1, at.expand(-1, -1, x.shape[2])).mT)))[..., 0]
        column.scatter_add_(1, best, torch.ones_like(column[:, :1]))
        seen = rows[:, :step]
        column = column - (seen.gather(2, at.expand(-1, step, 1)).mT @ seen)[:, 0]
        # a row that has no token left chooses among none: what is divided by is not used
        rows[:, step] = column / left.gather(1, best).clamp(min=1.0).sqrt()
        left = (left - rows[:, step].square()).scatter(1, best, float("-inf"))
    return picked


def _squared_similarities(x: Tensor) -> Tensor:
    """(B, N): the squared length of each row of ``x xᵀ``, of which `CHUNK` rows exist at a time."""
    return torch.cat([(part @ x.mT).square().sum(2) for part in x.split(CHUNK, 1)], 1)
