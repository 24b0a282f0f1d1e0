# SPDX-License-Identifier: Apache-2.0
"""Bipartite merging in rounds until a budget is met."""

from __future__ import annotations

import torch
from torch import Tensor

from vtoken.context import VisualContext
from vtoken.ops import Merged, bipartite_merge, row_sizes
from vtoken.reducers.views import Views


def merge_down(
    metric: Tensor, x: Tensor, valid: Tensor, target: Tensor, rounds: int = 1, sizes: Tensor | None = None
) -> Merged:
    """Merge each row down to ``target`` tokens.

    Parameters
    ----------
    metric : Tensor
        (B, N, c): what similarity is measured on; merged along with ``x``.
    x : Tensor
        (B, N, C).
    valid : Tensor
        (B, N) bool, True values in front.
    target : Tensor
        (B,) long: at least 1 for a row with tokens.
    rounds : int
        Rounds of equal size; more are added where one would merge over half of the tokens.
    sizes : Tensor, optional
        (B, N): weights of the means; every round counts its rows equally if omitted (AIM).

    Returns
    -------
    Merged
        ``source`` names the final row of each token.
    """
    source = torch.where(valid, torch.arange(valid.shape[1], device=valid.device), -1)
    step = -(-(valid.sum(1) - target) // rounds)
    features = x.float().masked_fill(~valid[..., None], 0.0)
    while bool((valid.sum(1) > target).any()):
        count = valid.sum(1)
        merged = bipartite_merge(metric, features, torch.minimum(step, count - target), sizes, valid)
        metric = bipartite_merge(metric, metric, torch.minimum(step, count - target), sizes, valid).features
        source = torch.where(source < 0, -1, merged.source.gather(1, source.clamp(min=0)))
        features = merged.features
        if sizes is not None:
            sizes = row_sizes(merged.source, features.shape[1], sizes.masked_fill(~valid, 0.0))
        left = torch.maximum(count - torch.minimum(step, count - target), count - count // 2)
        valid = torch.arange(features.shape[1], device=valid.device) < left[:, None]
    return Merged(features, source)


def merge_views(
    ctx: VisualContext, metric: Tensor, budget: Tensor, rounds: int = 1, weighted: bool = False
) -> Tensor:
    """Merge inside each view, with the budget (I,) split over the views by their size.

    The features of the merged tokens are left in ``ctx.scratch["merged"]`` (I, N, D), in the slot of the first token
    of each group.

    Parameters
    ----------
    metric : Tensor
        (I, N, c).
    weighted : bool
        Count the patches behind each token.

    Returns
    -------
    Tensor
        (I, N) long: the slot that each token goes into, -1 for tokens that are no candidates.
    """
    views = Views.of(ctx)
    sizes = None
    if weighted:
        sizes = views.take(torch.ones_like(ctx.view).float() if ctx.sizes is None else ctx.sizes)
    features = views.take(ctx.features)
    merged = merge_down(views.take(metric), features, views.valid, views.share(budget), rounds, sizes)
    place = torch.arange(views.slots.shape[2], device=metric.device).expand_as(merged.source)
    rows = merged.features.shape[1]
    first = place.new_full((len(place), rows + 1), place.shape[1])
    first.scatter_reduce_(1, torch.where(merged.source < 0, rows, merged.source), place, "amin")
    source = views.scatter(first.gather(1, merged.source.clamp(min=0)).masked_fill(merged.source < 0, -1), ctx.longest)
    inside = first[:, :-1] < place.shape[1]
    slots = views.slots.flatten(0, 1).gather(1, first[:, :-1].clamp(max=place.shape[1] - 1))
    slots = torch.where(inside, slots, ctx.longest).view(ctx.items, -1)
    out = torch.cat([ctx.features.float(), ctx.features.new_zeros(ctx.items, 1, features.shape[2]).float()], 1)
    values = merged.features.reshape(ctx.items, -1, features.shape[2])
    out.scatter_(1, slots[..., None].expand_as(values), values)
    ctx.scratch["merged"] = out[:, :-1]
    return source
