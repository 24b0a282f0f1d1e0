# SPDX-License-Identifier: Apache-2.0
"""Bipartite merging in rounds until a budget is met."""

from __future__ import annotations

import torch
from torch import Tensor

from vtoken.context import VisualContext
from vtoken.ops import bipartite_merge, row_sizes
from vtoken.reducers.base import Assignment
from vtoken.reducers.views import Views


def merge_down(
    metric: Tensor, valid: Tensor, target: Tensor, rounds: int = 1, sizes: Tensor | None = None
) -> Assignment:
    """Merge each row down to ``target`` tokens.

    Parameters
    ----------
    metric : Tensor
        (B, N, c): what similarity is measured on; it is merged along.
    valid : Tensor
        (B, N) bool, True values in front.
    target : Tensor
        (B,) long: at least 1 for a row with tokens.
    rounds : int
        Rounds of equal size; more are added where one would merge over half of the tokens.
    sizes : Tensor, optional
        (B, N): weights of the means (ToMe); without them a round counts its tokens equally whatever they hold (AIM).

    Returns
    -------
    Assignment
        ``source`` (B, N) names the final row of each token, ``weights`` its weight in the mean.
    """
    source = torch.where(valid, torch.arange(valid.shape[1], device=valid.device), -1)
    weights = torch.ones_like(valid, dtype=torch.float32) if sizes is None else sizes
    count = valid.sum(1)
    step = -(-(count - target) // rounds)
    while bool((count > target).any()):
        r = torch.minimum(step, count - target)
        merged = bipartite_merge(metric, metric, r, sizes, valid)
        if sizes is None:
            members = row_sizes(merged.source, merged.features.shape[1])
            weights = weights / members.gather(1, merged.source.clamp(min=0)).gather(1, source.clamp(min=0))
        else:
            sizes = row_sizes(merged.source, merged.features.shape[1], sizes)
        source = torch.where(source < 0, -1, merged.source.gather(1, source.clamp(min=0)))
        metric, count = merged.features, count - torch.minimum(r, count // 2)
        valid = torch.arange(metric.shape[1], device=valid.device) < count[:, None]
    return Assignment(source, weights)


def merge_views(
    ctx: VisualContext, metric: Tensor, budget: Tensor, rounds: int = 1, weighted: bool = False
) -> Assignment:
    """Merge inside each view, with the budget (I,) split over the views by their size.

    Parameters
    ----------
    metric : Tensor
        (I, N, c).
    weighted : bool
        Count the patches behind each token.

    Returns
    -------
    Assignment
        Tokens go into the slot of the first token of their group; those of a view that may keep none are dropped.
    """
    views = Views.of(ctx)
    known = torch.ones_like(ctx.view, dtype=torch.float32) if ctx.sizes is None else ctx.sizes.float()
    sizes = views.take(known) if weighted else None
    quota = views.share(budget)
    found = merge_down(views.take(metric), views.valid & (quota > 0)[:, None], quota, rounds, sizes)
    tokens = found.source.shape[1]
    place = torch.arange(tokens, device=metric.device).expand_as(found.source)
    first = place.new_full((len(place), tokens + 1), tokens)
    first.scatter_reduce_(1, torch.where(found.source < 0, tokens, found.source), place, "amin")
    target = first.gather(1, found.source.clamp(min=0)).masked_fill(found.source < 0, -1)
    assert found.weights is not None
    return Assignment(views.scatter(target, ctx.longest), known if weighted else views.spread(found.weights, known))
