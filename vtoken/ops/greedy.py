# SPDX-License-Identifier: Apache-2.0
"""Greedy selections whose next pick depends on the cosine similarities to the picks so far.

All of them share one loop. What differs is a state (B, N), how a new column of similarities is folded into it, and how
it ranks the tokens that are left. No N x N matrix is formed: columns are computed for the best candidates of a moment
in one product, and later picks are served from it while they are among them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vtoken.ops.common import counts, finite, first_of, mask_of, unit_vectors

BLOCK = 48  # columns a product: 13 to 19 products serve 287 picks of 2880 tokens
CHUNK = 512  # rows of similarities held at a time


class Columns:
    """Cosine similarities of picks to all tokens, computed a block of candidates at a time.

    Parameters
    ----------
    unit : Tensor
        (B, N, D) unit vectors.
    """

    def __init__(self, unit: Tensor) -> None:
        self.unit = unit
        size, tokens, _ = unit.shape
        self.width = min(BLOCK, tokens)
        self.place = torch.full((size, tokens), -1, dtype=torch.long, device=unit.device)
        self.table = unit.new_empty(size, 0, tokens)

    def __call__(self, picks: Tensor, scores: Tensor) -> Tensor:
        """Similarities (B, P, N) of ``picks`` (B, P), which are the best tokens by ``scores`` (B, N)."""
        place = self.place.gather(1, picks)
        if bool((place < 0).any()):
            self._fill(scores, picks.shape[1])
            place = self.place.gather(1, picks)
        return self.table.gather(1, place[..., None].expand(-1, -1, self.table.shape[2]))

    def _fill(self, scores: Tensor, least: int) -> None:
        best = scores.sort(dim=1, descending=True, stable=True).indices[:, : max(self.width, least)]
        self.table = self.unit.gather(1, best[..., None].expand(-1, -1, self.unit.shape[2])) @ self.unit.mT
        self.place.fill_(-1).scatter_(1, best, torch.arange(best.shape[1], device=best.device).expand_as(best))


def greedy(
    unit: Tensor,
    k: Tensor,
    valid: Tensor,
    first: Tensor,
    fold: Callable[[Tensor | None, Tensor], Tensor],
    rank: Callable[[Tensor], Tensor],
    parallel: int = 1,
) -> Tensor:
    """Pick the best token, fold its similarities into the state, rank again.

    Parameters
    ----------
    unit : Tensor
        (B, N, D) unit vectors.
    k : Tensor
        (B,) long.
    valid : Tensor
        (B, N) bool.
    first : Tensor
        (B, N): ranks the first pick.
    fold : callable
        ``fold(state or None, columns (B, P, N)) -> state``.
    rank : callable
        ``rank(state) -> (B, N)``: higher is picked sooner.
    parallel : int
        Picks a step; they do not see each other.

    Returns
    -------
    Tensor
        (B, max k) long in pick order, padded with -1.
    """
    size, longest = len(k), int(k.max())
    free, state, scores = valid.clone(), None, first
    columns, picked = Columns(unit), k.new_full((size, longest), -1)
    for step in range(0, longest, parallel):
        scores = scores.masked_fill(~free, float("-inf"))
        width = min(parallel, longest - step)
        best = scores.argmax(1, keepdim=True) if width == 1 else _best(scores, width)
        at = step + torch.arange(width, device=k.device)
        picked[:, step : step + width] = torch.where(at < k[:, None], best, -1)
        if step + width < longest:
            free.scatter_(1, best, False)
            state = fold(state, columns(best, scores))
            scores = rank(state)
    return picked


def _best(scores: Tensor, width: int) -> Tensor:
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :width]


def _nearest(state: Tensor | None, columns: Tensor) -> Tensor:
    """Largest similarity to a pick."""
    best = columns.amax(1)
    return best if state is None else torch.maximum(state, best)


def _only(start: Tensor, like: Tensor) -> Tensor:
    """(B, N) scores that put ``start`` (B,) first."""
    return torch.zeros(like.shape, device=like.device).scatter_(1, start[:, None], 1.0)


def _start(start: Tensor | None, valid: Tensor) -> Tensor:
    if start is None:
        return first_of(valid)
    start = start.to(valid.device).long()
    if start.shape != valid.shape[:1] or bool((start < 0).any() or (start >= valid.shape[1]).any()):
        raise ValueError(f"start={start.tolist()} does not name one of {valid.shape[1]} tokens for each of the rows.")
    if bool((~valid.gather(1, start[:, None])[:, 0] & valid.any(1)).any()):
        raise ValueError(f"start={start.tolist()} names a token that is not valid.")
    return start


def k_center(features: Tensor, k: int | Tensor, start: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """Farthest-point selection: the largest smallest distance ``1 - cos`` to the picks (ToDRE v1, arXiv 2505.18757).

    Parameters
    ----------
    features : Tensor
        (B, N, D).
    k : int or Tensor
        How many, or (B,) long; more than there are valid tokens means all of them.
    start : Tensor, optional
        (B,) long: the first pick; the first valid token if omitted.
    valid : Tensor, optional
        (B, N) bool: tokens to choose from.

    Returns
    -------
    Tensor
        (B, max k) long in pick order, padded with -1.

    Raises
    ------
    ValueError
        If a feature is not finite, ``k`` is negative, or ``start`` is no valid token.
    """
    valid = mask_of(features, valid)
    first = _only(_start(start, valid), valid)
    return greedy(unit_vectors(features, valid), counts(k, valid), valid, first, _nearest, torch.neg)


def max_sum(features: Tensor, k: int | Tensor, start: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """Max-sum diversification: the smallest sum of cosines to the picks (ToDRE v2, arXiv 2505.18757, Eq. 4-6).

    Parameters, result and errors are those of `k_center`.
    """
    valid = mask_of(features, valid)
    first = _only(_start(start, valid), valid)

    def total(state: Tensor | None, columns: Tensor) -> Tensor:
        return columns.sum(1) if state is None else state + columns.sum(1)

    return greedy(unit_vectors(features, valid), counts(k, valid), valid, first, total, torch.neg)


def max_min(features: Tensor, k: int | Tensor, valid: Tensor | None = None) -> Tensor:
    """Max-min selection that starts at the token farthest from its nearest neighbour (DivPrune, arXiv 2503.02175).

    Picked tokens leave the choice, so identical tokens give no duplicates. Parameters, result and errors are those of
    `k_center`.
    """
    valid = mask_of(features, valid)
    unit = unit_vectors(features, valid)
    return greedy(unit, counts(k, valid), valid, -nearest_similarity(unit, valid), _nearest, torch.neg)


def nearest_similarity(unit: Tensor, valid: Tensor) -> Tensor:
    """(B, N): cosine of each token and its nearest other valid token; -1 if it is alone."""
    tokens = torch.arange(unit.shape[1], device=unit.device)
    parts = []
    for rows in tokens.split(CHUNK):
        near = unit[:, rows] @ unit.mT
        near.masked_fill_(~valid[:, None, :] | (rows[:, None] == tokens), -1.0)
        parts.append(near.amax(2))
    return torch.cat(parts, 1)


def mmr(
    features: Tensor,
    importance: Tensor,
    k: int | Tensor,
    lam: float = 0.5,
    parallel: int = 1,
    valid: Tensor | None = None,
) -> Tensor:
    """Maximal marginal relevance (IDPruner, arXiv 2602.13315).

    The first pick is the most important token; then ``lam * importance - (1 - lam) * max cos(token, picks)`` decides,
    with the importance scaled to [0, 1] in each row.

    Parameters
    ----------
    features : Tensor
        (B, N, D).
    importance : Tensor
        (B, N), any scale.
    k : int or Tensor
        How many, or (B,) long; more than there are valid tokens means all of them.
    lam : float
        Weight of the importance, in [0, 1].
    parallel : int
        Picks a step; they do not see each other.
    valid : Tensor, optional
        (B, N) bool: tokens to choose from.

    Returns
    -------
    Tensor
        (B, max k) long in pick order, padded with -1.

    Raises
    ------
    ValueError
        If a feature or an importance is not finite, or ``k``, ``lam`` or ``parallel`` is out of range.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam={lam} is outside of [0, 1].")
    if parallel < 1:
        raise ValueError(f"parallel={parallel} is no number of picks: give at least 1.")
    valid = mask_of(features, valid)
    weight = scaled(finite(importance, valid, "importance scores"), valid, floor=1e-6)

    def rank(nearest: Tensor) -> Tensor:
        return lam * weight - (1 - lam) * nearest

    return greedy(unit_vectors(features, valid), counts(k, valid), valid, weight, _nearest, rank, parallel)


def sads(features: Tensor, weights: Tensor, k: int | Tensor, valid: Tensor | None = None) -> Tensor:
    """Sensitivity-aware diversity selection (ZOO-Prune, arXiv 2509.24837).

    The first pick has the largest weight; then ``weight * min (1 - cos(token, picks))`` decides.

    Parameters
    ----------
    features : Tensor
        (B, N, D).
    weights : Tensor
        (B, N), non-negative.
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
        If a feature or a weight is not finite, or ``k`` is negative.
    """
    valid = mask_of(features, valid)
    weights = finite(weights, valid, "weights")

    def rank(nearest: Tensor) -> Tensor:
        return weights * (1 - nearest)

    return greedy(unit_vectors(features, valid), counts(k, valid), valid, weights, _nearest, rank)


def scaled(values: Tensor, valid: Tensor, floor: float) -> Tensor:
    """``(values - min) / (max - min + floor)`` over the valid tokens of each row of (B, N)."""
    low = values.masked_fill(~valid, float("inf")).amin(1, keepdim=True)
    high = values.masked_fill(~valid, float("-inf")).amax(1, keepdim=True)
    return torch.where(valid, (values - low) / (high - low + floor), 0.0)
