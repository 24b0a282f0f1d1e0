# SPDX-License-Identifier: Apache-2.0
"""Greedy selections that score a token by its largest similarity to a pick, or by the sum of them.

On the host, `k_center`, `mmr` and `sads` are evaluated lazily. The others are not: a sum of cosines rises and falls, so
that no old score bounds a new one, and the first pick of `max_min` needs nearly all cosines anyway.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vtoken.ops.common import counts, finite, first_of, mask_of
from vtoken.ops.cosines import CHUNK, Cosines
from vtoken.ops.lazy import pick_lazily
from vtoken.ops.loop import on_host, only, pick_each, row_by_row
from vtoken.precision import selection


def start_of(start: Tensor | None, valid: Tensor) -> Tensor:
    """(B,) long: ``start``, or the first valid token of each row."""
    if start is None:
        return first_of(valid)
    start = start.to(valid.device).long()
    if start.shape != valid.shape[:1] or bool((start < 0).any() or (start >= valid.shape[1]).any()):
        raise ValueError(f"start={start.tolist()} does not name one of {valid.shape[1]} tokens for each of the rows.")
    if bool((~valid.gather(1, start[:, None])[:, 0] & valid.any(1)).any()):
        raise ValueError(f"start={start.tolist()} names a token that is not valid.")
    return start


@selection
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
    first = only(start_of(start, valid), valid)
    return _pick(
        Cosines(features, valid), counts(k, valid), valid, first, torch.zeros_like(first), torch.ones_like(first)
    )


@selection
def max_min(features: Tensor, k: int | Tensor, valid: Tensor | None = None) -> Tensor:
    """Max-min selection that starts at the token farthest from its nearest neighbour (DivPrune, arXiv 2503.02175).

    Picked tokens leave the choice, so identical tokens give no duplicates. Parameters, result and errors are those of
    `k_center`.
    """
    valid = mask_of(features, valid)
    return row_by_row(_from_most_isolated, Cosines(features, valid), counts(k, valid), valid)


def _from_most_isolated(cosines: Cosines, k: Tensor, valid: Tensor) -> Tensor:
    cosines = cosines.whole()
    first = -_nearest_similarity(cosines, valid)
    return pick_each(cosines, k, valid, first, torch.zeros_like(first), torch.ones_like(first))


def _nearest_similarity(cosines: Cosines, valid: Tensor) -> Tensor:
    """(B, N): cosine of each token and its nearest other valid token; -1 if it is alone."""
    tokens = torch.arange(cosines.shape[1], device=valid.device)
    outside = torch.zeros_like(valid, dtype=torch.float32).masked_fill_(~valid, float("-inf"))
    parts = []
    for start in range(0, len(tokens), CHUNK):
        near = cosines.columns(tokens[start : start + CHUNK].expand(len(valid), -1))
        if not on_host(valid.device):  # where rows have invalid tokens
            near = near + outside[:, None]
        near.diagonal(start, 1, 2).fill_(-1.0)
        parts.append(near.amax(2))
    return torch.cat(parts, 1)


@selection
def max_sum(features: Tensor, k: int | Tensor, start: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """Max-sum diversification: the smallest sum of cosines to the picks (ToDRE v2, arXiv 2505.18757, Eq. 4-6).

    Parameters, result and errors are those of `k_center`.
    """
    valid = mask_of(features, valid)
    first = only(start_of(start, valid), valid)
    pick = functools.partial(pick_each, add=True)
    values = first, torch.zeros_like(first), torch.ones_like(first)
    return row_by_row(pick, Cosines(features, valid), counts(k, valid), valid, *values)


@selection
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


@selection
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


def _pick(
    cosines: Cosines,
    k: Tensor,
    valid: Tensor,
    first: Tensor,
    offset: Tensor,
    slope: Tensor,
    parallel: int = 1,
) -> Tensor:
    """Picks (B, max k): the best by ``first`` (B, N), then by ``offset - slope * nearest``; these scores only fall."""
    pick = pick_lazily if on_host(valid.device) else pick_each
    return row_by_row(functools.partial(pick, parallel=parallel), cosines, k, valid, first, offset, slope)


def scaled(values: Tensor, valid: Tensor, floor: float) -> Tensor:
    """``(values - min) / (max - min + floor)`` over the valid tokens of each row of (B, N)."""
    low = values.masked_fill(~valid, float("inf")).amin(1, keepdim=True)
    high = values.masked_fill(~valid, float("-inf")).amax(1, keepdim=True)
    return torch.where(valid, (values - low) / (high - low + floor), 0.0)
