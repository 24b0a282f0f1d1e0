# SPDX-License-Identifier: Apache-2.0
"""Greedy maximum a posteriori set of a determinantal point process."""

from __future__ import annotations

import torch
from torch import Tensor

from vtoken.ops.common import counts, finite, mask_of, unit_vectors
from vtoken.ops.greedy import Columns

RANK_EPS = 1e-6  # conditional variance, relative to the token's own, below which float32 holds only rounding


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
    unit, relevance = unit_vectors(features, valid), finite(relevance, valid, "relevance scores")
    columns = Columns(unit)
    own = relevance.square() * unit.any(2)  # exactly, so that equal relevance is a tie
    left, free = own.clone(), valid.clone()
    longest = int(count.max())
    rows = unit.new_zeros(len(unit), longest, unit.shape[1])  # of the Cholesky factor
    picked = count.new_full((len(unit), longest), -1)
    spent = own - own.amax(1, keepdim=True) - 1.0  # below every variance, in order of relevance
    for step in range(longest):
        scores = torch.where(left > RANK_EPS * own, left, spent).masked_fill(~free, float("-inf"))
        best = scores.argmax(1, keepdim=True)
        picked[:, step] = torch.where(step < count, best[:, 0], -1)
        free.scatter_(1, best, False)
        column = relevance * relevance.gather(1, best) * columns(best, scores)[:, 0]
        seen = rows[:, :step]
        at_best = seen.gather(2, best[:, None].expand(-1, step, 1))
        column = column - (at_best.mT @ seen)[:, 0]
        variance = left.gather(1, best)
        fresh = variance > RANK_EPS * own.gather(1, best)
        rows[:, step] = torch.where(fresh, column / variance.clamp(min=1e-30).sqrt(), 0.0)
        left = left - rows[:, step].square()
    return picked
