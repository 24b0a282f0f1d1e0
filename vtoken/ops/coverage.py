# SPDX-License-Identifier: Apache-2.0
"""Greedy coverage of all tokens by the picked ones."""

from __future__ import annotations

import torch
from torch import Tensor

from vtoken.ops.common import counts, finite, mask_of, unit_vectors

BLOCK = 64  # candidates evaluated in one product


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
    unit, weight = unit_vectors(features, valid), importance**alpha
    search = _LazyGains(unit, valid, weight, combine == "add")
    picked = count.new_full((len(unit), int(count.max())), -1)
    for step in range(picked.shape[1]):
        best = search.next()
        picked[:, step] = torch.where(step < count, best[:, 0], -1)
    return picked


class _LazyGains:
    """Bounds on the gains of all candidates, sharpened for the best ones until the best of all is exact."""

    def __init__(self, unit: Tensor, valid: Tensor, weight: Tensor, add: bool) -> None:
        self.unit, self.weight, self.add = unit, weight, add
        self.free = valid.clone()
        self.cover = unit.new_zeros(unit.shape[:2])
        self.bound = torch.full_like(self.cover, float("inf"))
        self.width = min(BLOCK, unit.shape[1])

    def _scores(self, exact: Tensor) -> Tensor:
        scores = self.bound + self.weight if self.add else self.bound * self.weight
        unknown = self.bound.isinf() & ~exact
        return torch.where(unknown, float("inf"), scores).masked_fill(~self.free, float("-inf"))

    def next(self) -> Tensor:
        """(B, 1) long: the next pick."""
        exact = ~self.free
        while True:
            scores = self._scores(exact)
            best = scores.argmax(1, keepdim=True)
            if bool(exact.gather(1, best).all()):
                break
            self._evaluate(scores.masked_fill(exact, float("-inf")), exact)
        self.free.scatter_(1, best, False)
        self.cover = torch.maximum(self.cover, self._similarity(best)[:, 0])
        return best

    def _evaluate(self, scores: Tensor, exact: Tensor) -> None:
        index = scores.sort(dim=1, descending=True, stable=True).indices[:, : self.width]
        gains = (self._similarity(index) - self.cover[:, None]).clamp(min=0).sum(2)
        self.bound.scatter_(1, index, gains)
        exact.scatter_(1, index, True)

    def _similarity(self, index: Tensor) -> Tensor:
        return self.unit.gather(1, index[..., None].expand(-1, -1, self.unit.shape[2])) @ self.unit.mT
