# SPDX-License-Identifier: Apache-2.0
"""Greedy maximum a posteriori set of a determinantal point process."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vtoken.ops.common import counts, finite, mask_of
from vtoken.ops.cosines import Cosines
from vtoken.ops.lazy import lazy_greedy, on_host
from vtoken.ops.nested import nested_greedy, row_by_row
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
    return row_by_row(_pick, cosines, count, valid, relevance)


def _pick(cosines: Cosines, k: Tensor, valid: Tensor, relevance: Tensor) -> Tensor:
    own = relevance.square() * cosines.nonzero  # exactly: equal relevance is a tie
    spent = own - own.amax(1, keepdim=True) - 1.0
    bounds = _Variances(cosines, relevance, own.new_zeros(len(own), 0, own.shape[1]), own.clone(), own, spent)
    if on_host(k.device):
        return nested_greedy(bounds, valid.clone(), int(k))
    return lazy_greedy(bounds, k, valid.clone(), k.new_full((len(k), int(k.max())), -1))


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

    def row(self) -> _Row:
        return _Row(self)

    def recent(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (B, M, P) of the first ``count`` picks, their places and their deviations (B, M)."""
        return self.rows[:, :count], torch.cat(self.at[:count], 1), torch.cat(self.deviation[:count], 1)

    def fused(self, *args: object) -> None:
        """There is no kernel for this selection."""


class _Row:
    """The steps of a pool of one row, in numpy; the pool keeps what they find."""

    def __init__(self, pool: _Pool) -> None:
        self.pool = pool
        self.left, self.spent, self.kernel, self.rows = (
            every[0].numpy() for every in (pool.left, pool.spent, pool.kernel, pool.rows)
        )
        self.floor = (RANK_EPS * pool.own)[0].numpy()

    def scores(self) -> np.ndarray:
        return np.where(self.left > self.floor, self.left, self.spent)

    def take(self, at: int) -> None:
        step, deviation = len(self.pool.at), np.float32(0)
        if self.left[at] > self.floor[at]:
            seen, deviation = self.rows[:step], np.sqrt(self.left[at])
            self.rows[step] = (self.kernel[at] - seen[:, at] @ seen) / deviation
            self.left = self.left - np.square(self.rows[step])
        self.pool.at.append(torch.tensor([[at]], device="cpu"))
        self.pool.deviation.append(torch.tensor([[deviation]], dtype=torch.float32, device="cpu"))


class _Variances(_Scores):
    """The variances of all tokens, or of an outer pool, and their Cholesky rows (B, picks, N)."""

    def __init__(self, cosines: Cosines, relevance: Tensor, rows: Tensor, *scores: Tensor) -> None:
        super().__init__(*scores)
        self.cosines, self.relevance, self.rows = cosines, relevance, rows
        self.begin = rows.shape[1]
        self.at = torch.zeros(len(rows), 0, dtype=torch.long, device=rows.device)
        self.deviation = rows.new_zeros(len(rows), 0)

    def pool(self, index: Tensor) -> _Pool:
        relevance, known, left, own, spent = self._of(index)
        kernel = relevance[..., None] * self.cosines.among(index) * relevance[:, None] - known.mT @ known
        return _Pool(left, own, spent, kernel)

    def narrow(self, index: Tensor) -> _Variances:
        return _Variances(self.cosines.part(0, index[0]), *self._of(index))

    def _of(self, index: Tensor) -> tuple[Tensor, ...]:
        rows = self.rows.gather(2, index[:, None].expand(-1, self.rows.shape[1], -1))
        return self.relevance.gather(1, index), rows, *(x.gather(1, index) for x in (self.left, self.own, self.spent))

    def recent(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """As of a `_Pool`."""
        return self.rows[:, self.begin : self.begin + count], self.at[:, :count], self.deviation[:, :count]

    def catch_up(self, picks: Tensor, pool: _Pool | _Variances) -> None:
        """Cholesky rows of all tokens for ``picks`` (B, M) at once: one triangular system."""
        count = picks.shape[1]
        known, at, deviation = pool.recent(count)
        fresh = deviation > 0
        weight = self.relevance.gather(1, picks)
        target = weight[..., None] * self.cosines.columns(picks) * self.relevance[:, None]
        target = target - self.rows.gather(2, picks[:, None].expand(-1, self.rows.shape[1], -1)).mT @ self.rows
        known = known.gather(2, at[:, None].expand(-1, count, -1)).mT  # [s, t]: row t at pick s
        system = known.tril(-1) * fresh[..., None] + torch.diag_embed(torch.where(fresh, deviation, 1.0))
        rows = torch.linalg.solve_triangular(system, target * fresh[..., None], upper=False)
        self.rows = torch.cat([self.rows, rows], 1)
        self.at, self.deviation = torch.cat([self.at, picks], 1), torch.cat([self.deviation, deviation], 1)
        self.left = self.left - rows.square().sum(1)
