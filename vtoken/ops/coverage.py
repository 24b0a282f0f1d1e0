# SPDX-License-Identifier: Apache-2.0
"""Greedy coverage of all tokens by the picked ones."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from vtoken.ops.common import counts, finite, mask_of
from vtoken.ops.cosines import Cosines
from vtoken.ops.loop import one_thread, row_by_row
from vtoken.precision import selection, without_autocast

BLOCK = 16  # candidates evaluated at a time
CHUNK = 512  # the same before the first pick, when all are


@selection
def coverage(
    features: Tensor,
    importance: Tensor,
    k: int | Tensor,
    alpha: float = 1.0,
    valid: Tensor | None = None,
    combine: str = "multiply",
) -> Tensor:
    """Pick the token that adds most coverage, weighted by importance (SCOPE, arXiv 2510.24214).

    A set covers token j by its largest cosine to it, at least 0. The gain of a candidate c is
    ``sum_j max(0, cos(j, c) - cover_j)``. Gains never grow while the set does, so an old gain bounds the present one
    and only candidates whose bound reaches the best are evaluated again; the answer is that of the full greedy.

    Parameters
    ----------
    features : Tensor
        (B, N, D).
    importance : Tensor
        (B, N), non-negative.
    k : int or Tensor
        How many, or (B,) long; more than there are valid tokens means all of them.
    alpha : float
        Exponent of the importance.
    valid : Tensor, optional
        (B, N) bool: tokens to choose from and to cover.
    combine : str
        ``"multiply"``: gain * importance ** alpha; ``"add"``: gain + importance ** alpha.

    Returns
    -------
    Tensor
        (B, max k) long in pick order, padded with -1.

    Raises
    ------
    ValueError
        If a feature or an importance is not finite, an importance is negative, or ``combine`` is unknown.
    """
    if combine not in ("multiply", "add"):
        raise ValueError(f"combine={combine!r}: choose one of ['multiply', 'add'].")
    valid = mask_of(features, valid)
    count = counts(k, valid)
    importance = finite(importance, valid, "importance scores")
    if bool((importance < 0).any()):
        raise ValueError(f"importance holds {importance.min().item():.3g}: coverage takes values of at least 0.")
    pick = functools.partial(_pick, add=combine == "add")
    return row_by_row(pick, Cosines(features, valid), count, valid, importance**alpha)


def cover(columns: Callable[[Tensor], Tensor], rows: int, k: int | Tensor, valid: Tensor) -> Tensor:
    """Pick the column of a non-negative matrix that adds most to what the picks cover of its rows (maximum coverage).

    A set covers row r by its largest entry there; the gain of column c is ``sum_r max(0, C[r, c] - cover_r)``. As in
    `coverage`, only columns whose old gain reaches the best are evaluated again.

    Parameters
    ----------
    columns : callable
        ``columns(index)`` gives the columns ``index`` (B, P) of the matrices (B, R, N), as (B, P, R) float32.
    rows : int
        R.
    k : int or Tensor
        How many, or (B,) long; more than there are valid columns means all of them.
    valid : Tensor
        (B, N) bool: columns to choose from.

    Returns
    -------
    Tensor
        (B, max k) long in pick order, padded with -1.
    """
    count = counts(k, valid)
    weight = torch.ones_like(valid, dtype=torch.float32)
    with torch.no_grad(), without_autocast(valid.device):
        return _take(_LazyGains(columns, rows, valid, weight, add=False), count, rows * valid.shape[1])


def _pick(cosines: Cosines, k: Tensor, valid: Tensor, weight: Tensor, add: bool) -> Tensor:
    cosines = cosines.whole()
    return _take(_LazyGains(cosines.columns, cosines.shape[1], valid, weight, add), k, cosines.read)


def _take(search: _LazyGains, k: Tensor, read: int) -> Tensor:
    """Picks (B, max k); ``read`` numbers are behind a column."""
    picked = k.new_full((len(k), int(k.max())), -1)
    with one_thread(k.device, read):
        for step in range(picked.shape[1]):
            best = search.next()
            picked[:, step] = torch.where(step < k, best[:, 0], -1)
    return picked


class _LazyGains:
    """Bounds on the gains of all candidates, sharpened for the best ones until the best of all is exact."""

    def __init__(
        self, columns: Callable[[Tensor], Tensor], rows: int, valid: Tensor, weight: Tensor, add: bool
    ) -> None:
        self.columns, self.weight, self.add = columns, weight, add
        self.free = valid.clone()
        self.cover = weight.new_zeros(len(valid), rows)
        tokens = torch.arange(valid.shape[1], device=valid.device)
        self.bound = torch.cat([self._gains(part.expand(len(valid), -1)) for part in tokens.split(CHUNK)], 1)
        self.exact = torch.ones_like(self.free)

    def next(self) -> Tensor:
        """(B, 1) long: the next pick."""
        while True:
            scores = self.bound + self.weight if self.add else self.bound * self.weight
            scores = scores.masked_fill(~self.free, float("-inf"))
            best = scores.argmax(1, keepdim=True)
            if bool((self.exact.gather(1, best) | ~self.free.gather(1, best)).all()):
                break
            waiting = scores.masked_fill(self.exact, float("-inf"))
            index = waiting.topk(min(BLOCK, waiting.shape[1]), sorted=False).indices  # any of equal ones will do
            self.bound.scatter_(1, index, self._gains(index))
            self.exact.scatter_(1, index, True)
        self.free.scatter_(1, best, False)
        self.cover = torch.maximum(self.cover, self.columns(best)[:, 0])
        self.exact.fill_(False)
        return best

    def _gains(self, index: Tensor) -> Tensor:
        return (self.columns(index) - self.cover[:, None]).clamp(min=0).sum(2)
