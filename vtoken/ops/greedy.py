# SPDX-License-Identifier: Apache-2.0
"""Greedy selections whose next pick depends on the cosine similarities to the picks so far.

All but `max_sum` score a token by its largest similarity to a pick, so that scores only fall and `lazy_greedy` applies.
On a GPU with Triton, the picks of a pool are made by one kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtoken.ops import triton_greedy
from vtoken.ops.common import counts, finite, first_of, mask_of
from vtoken.ops.cosines import CachedColumns, Cosines
from vtoken.ops.lazy import Rival, best_of, lazy_greedy, on_host

CHUNK = 512  # rows of similarities held at a time
BLOCK = 32  # columns that are fetched at a time
PART = 256  # tokens that those in the race for the most isolated one meet at a time
FINAL = 16  # of them, whose nearest neighbours are found at once
SHARPENED = 2  # parts after which that is done, for a limit that the others must not exceed
SMALL = 512  # tokens up to which all similarities are cheaper than to look for those that are needed
ROUNDING = 1e-5  # by which cosines from products of other shapes may differ


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


class _Bounds:
    """The same scores of all tokens."""

    def __init__(self, cosines: Cosines, offset: Tensor, slope: Tensor, picks: Tensor, add: bool = False) -> None:
        self.cosines, self.offset, self.slope, self.add = cosines, offset, slope, add
        self.state = self._of(picks)

    def _of(self, picks: Tensor) -> Tensor:
        columns = self.cosines.columns(picks)
        return columns.sum(1) if self.add else columns.amax(1)

    def scores(self) -> Tensor:
        return self.offset - self.slope * self.state

    def pool(self, index: Tensor) -> _Pool:
        offset, slope, state = (x.gather(1, index) for x in (self.offset, self.slope, self.state))
        return _Pool(offset, slope, state, self.cosines.among(index), self.add)

    def catch_up(self, picks: Tensor, pool: object) -> None:
        new = self._of(picks)
        self.state = self.state + new if self.add else torch.maximum(self.state, new)


def _pick(
    cosines: Cosines,
    k: Tensor,
    valid: Tensor,
    first: Tensor,
    offset: Tensor | None = None,
    slope: Tensor | None = None,
    parallel: int = 1,
    add: bool = False,
) -> Tensor:
    """Picks (B, max k): the best by ``first`` (B, N), then by ``offset - slope * state`` (default: ``-state``)."""
    picked = k.new_full((len(k), int(k.max())), -1)
    begin = min(parallel, picked.shape[1])
    if begin:
        picks = best_of(first.masked_fill(~valid, float("-inf")), begin)
        picked[:, :begin] = torch.where(torch.arange(begin, device=k.device) < k[:, None], picks, -1)
    if begin == picked.shape[1]:
        return picked
    offset = torch.zeros_like(first) if offset is None else offset
    slope = torch.ones_like(first) if slope is None else slope
    bounds = _Bounds(cosines, offset, slope, picks, add)
    width = valid.shape[1] if add else 0  # sums do not only grow: nothing outside of a pool would be bounded
    return lazy_greedy(bounds, k, valid.clone().scatter_(1, picks, False), picked, begin, parallel, width)


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
    return _pick(Cosines(features, valid), counts(k, valid), valid, first)


def max_sum(features: Tensor, k: int | Tensor, start: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """Max-sum diversification: the smallest sum of cosines to the picks (ToDRE v2, arXiv 2505.18757, Eq. 4-6).

    Parameters, result and errors are those of `k_center`.
    """
    valid = mask_of(features, valid)
    first = _only(_start(start, valid), valid)

    count, cosines = counts(k, valid), Cosines(features, valid)
    if first.shape[1] <= SMALL or not on_host(first.device):  # columns on demand would mean a host sync per pick
        return _pick(cosines, count, valid, first, add=True)
    picked = count.new_full((len(count), int(count.max())), -1)
    columns, total = CachedColumns(cosines, picked.shape[1], BLOCK), torch.zeros_like(first)
    scores, free = first, valid.clone()
    for step in range(picked.shape[1]):
        scores = scores.masked_fill(~free, float("-inf"))
        best = best_of(scores, 1)
        picked[:, step] = torch.where(step < count, best[:, 0], -1)
        free.scatter_(1, best, False)
        if step + 1 < picked.shape[1]:
            total = total + columns(best, scores)[:, 0]
            scores = -total
    return picked


def max_min(features: Tensor, k: int | Tensor, valid: Tensor | None = None) -> Tensor:
    """Max-min selection that starts at the token farthest from its nearest neighbour (DivPrune, arXiv 2503.02175).

    Picked tokens leave the choice, so identical tokens give no duplicates. Parameters, result and errors are those of
    `k_center`.
    """
    valid = mask_of(features, valid)
    cosines = Cosines(features, valid)
    if on_host(valid.device):
        first = _only(most_isolated(cosines, valid), valid)
    else:
        first = -nearest_similarity(cosines, valid)
    return _pick(cosines, counts(k, valid), valid, first)


def nearest_similarity(cosines: Cosines, valid: Tensor) -> Tensor:
    """(B, N): cosine of each token and its nearest other valid token; -1 if it is alone."""
    tokens = torch.arange(cosines.shape[1], device=valid.device)
    parts = []
    for rows in tokens.split(CHUNK):
        near = cosines.columns(rows.expand(len(valid), -1))
        near.masked_fill_(~valid[:, None, :] | (rows[:, None] == tokens), -1.0)
        parts.append(near.amax(2))
    return torch.cat(parts, 1)


def most_isolated(cosines: Cosines, valid: Tensor) -> Tensor:
    """(B,) long: the token with the smallest `nearest_similarity`, without computing it for all."""
    return torch.stack([_most_isolated(cosines, row, mask.nonzero()[:, 0]) for row, mask in enumerate(valid)])


def _most_isolated(cosines: Cosines, row: int, tokens: Tensor) -> Tensor:
    """Tokens meet the others part by part and leave the race once they are nearer to one than the best is to any."""
    if not len(tokens):
        return tokens.new_zeros(())
    every = cosines.rows(row, tokens)

    def similarity(rows: Tensor, some: Tensor, others: Tensor) -> Tensor:
        return cosines.between(row, rows, some, others).masked_fill_(some[:, None] == others, -1.0)

    racing, rows = tokens, every
    found, limit = torch.full(tokens.shape, -1.0, device=tokens.device), 1.0
    order = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0)).to(tokens.device)]
    for turn, others in enumerate(order.split(PART)):  # in random order: neighbours are alike and would tell little
        if len(racing) <= FINAL:
            break
        found = torch.maximum(found, similarity(rows, racing, others).amax(1))
        if turn < SHARPENED:
            few = racing[found.topk(min(FINAL, len(racing)), largest=False).indices]
            limit = min(limit, float(similarity(every, tokens, few).amax(0).amin()) + ROUNDING)
        ahead = found <= limit
        if 2 * int(ahead.sum()) <= len(ahead):  # copying the rows of fewer tokens costs more than it saves
            racing, rows, found = racing[ahead], rows[ahead], found[ahead]
    if len(racing) <= FINAL:
        found = similarity(every, tokens, racing).amax(0)
    return racing[found.argmin()]


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
    slope = torch.full_like(weight, 1 - lam)
    return _pick(Cosines(features, valid), counts(k, valid), valid, weight, lam * weight, slope, parallel)


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
    return _pick(Cosines(features, valid), counts(k, valid), valid, weights, weights, weights)


def scaled(values: Tensor, valid: Tensor, floor: float) -> Tensor:
    """``(values - min) / (max - min + floor)`` over the valid tokens of each row of (B, N)."""
    low = values.masked_fill(~valid, float("inf")).amin(1, keepdim=True)
    high = values.masked_fill(~valid, float("-inf")).amax(1, keepdim=True)
    return torch.where(valid, (values - low) / (high - low + floor), 0.0)
