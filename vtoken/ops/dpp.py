# SPDX-License-Identifier: Apache-2.0
"""Greedy maximum a posteriori set of a determinantal point process."""

from __future__ import annotations

import torch
from torch import Tensor

from vtoken.ops.common import counts, finite, mask_of
from vtoken.ops.cosines import Cosines
from vtoken.ops.lazy import lazy_greedy

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
    cosines, relevance = Cosines(features, valid), finite(relevance, valid, "relevance scores")
    picked = count.new_full((len(count), int(count.max())), -1)
    return lazy_greedy(_Variances(cosines, relevance, valid), count, valid.clone(), picked, 0)


class _Scores:
    """Conditional variances (B, N); where a variance is used up, relevance decides, below all others."""

    def __init__(self, left: Tensor, own: Tensor, spent: Tensor) -> None:
        self.left, self.own, self.spent = left, own, spent

    def scores(self) -> Tensor:
        return torch.where(self.left > RANK_EPS * self.own, self.left, self.spent)


class _Pool(_Scores):
    """Tokens of a pool with their kernel (B, P, P), given the picks before it, and the Cholesky rows of its own."""

    def __init__(self, left: Tensor, own: Tensor, spent: Tensor, kernel: Tensor) -> None:
        super().__init__(left, own, spent)
        self.kernel = kernel
        self.rows = torch.zeros_like(kernel)
        self.at: list[Tensor] = []
        self.deviation: list[Tensor] = []  # 0 where the variance is used up

    def take(self, at: Tensor) -> None:
        step, width = len(self.at), self.kernel.shape[2]
        variance = self.left.gather(1, at)
        fresh = variance > RANK_EPS * self.own.gather(1, at)
        deviation = torch.where(fresh, variance.clamp(min=1e-30).sqrt(), 0.0)
        seen = self.rows[:, :step]
        column = self.kernel.gather(1, at[..., None].expand(-1, -1, width))
        column = column - seen.gather(2, at[:, None].expand(-1, step, 1)).mT @ seen
        self.rows[:, step] = torch.where(fresh, column[:, 0] / deviation, 0.0)
        self.left = self.left - self.rows[:, step].square()
        self.at.append(at)
        self.deviation.append(deviation)

    def fused(self, *args: object) -> None:
        """There is no kernel for this selection."""


class _Variances(_Scores):
    """The variances of all tokens and their Cholesky rows (B, picks, N)."""

    def __init__(self, cosines: Cosines, relevance: Tensor, valid: Tensor) -> None:
        own = relevance.square() * cosines.nonzero  # exactly: equal relevance is a tie
        super().__init__(own.clone(), own, own - own.amax(1, keepdim=True) - 1.0)
        self.cosines, self.relevance = cosines, relevance
        self.rows = own.new_zeros(len(own), 0, own.shape[1])

    def pool(self, index: Tensor) -> _Pool:
        weight = self.relevance.gather(1, index)
        known = self.rows.gather(2, index[:, None].expand(-1, self.rows.shape[1], -1))
        kernel = weight[..., None] * self.cosines.among(index) * weight[:, None] - known.mT @ known
        left, own, spent = (x.gather(1, index) for x in (self.left, self.own, self.spent))
        return _Pool(left, own, spent, kernel)

    def catch_up(self, picks: Tensor, pool: _Pool) -> None:
        """Cholesky rows of all tokens for ``picks`` (B, M) at once: one triangular system."""
        count = picks.shape[1]
        at, deviation = torch.cat(pool.at[:count], 1), torch.cat(pool.deviation[:count], 1)
        fresh = deviation > 0
        weight = self.relevance.gather(1, picks)
        target = weight[..., None] * self.cosines.columns(picks) * self.relevance[:, None]
        target = target - self.rows.gather(2, picks[:, None].expand(-1, self.rows.shape[1], -1)).mT @ self.rows
        known = pool.rows[:, :count].gather(2, at[:, None].expand(-1, count, -1)).mT  # [s, t]: row t at pick s
        system = known.tril(-1) * fresh[..., None] + torch.diag_embed(torch.where(fresh, deviation, 1.0))
        rows = torch.linalg.solve_triangular(system, target * fresh[..., None], upper=False)
        self.rows = torch.cat([self.rows, rows], 1)
        self.left = self.left - rows.square().sum(1)
