# SPDX-License-Identifier: Apache-2.0
"""PruneSID: principal components group the tokens, and each group keeps what is important and not redundant."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from vtoken.context import VisualContext
from vtoken.ops.common import EPS, finite
from vtoken.precision import selection
from vtoken.reducers.base import SelectReducer
from vtoken.reducers.checks import check_choice
from vtoken.reducers.encoded import EncoderReducer
from vtoken.reducers.views import Views
from vtoken.reducers.visual import VISUAL, visual_features
from vtoken.registry import register


@register("prunesid")
@dataclass(frozen=True)
class PruneSID(EncoderReducer, SelectReducer):
    """PruneSID (arXiv 2603.09480): groups by principal component, then suppression inside of each group.

    A quarter as many components as tokens are kept group the tokens of a view. In the order of [CLS] attention, a token
    suppresses those of its group that resemble it more than a threshold, which rises with the budget. Groups share the
    budget by how many tokens survived; suppressed ones return where too few did. Each view gets the same budget.

    The components are exact; the authors' are those of a random sketch, with which many tokens change their group from
    run to run. [CLS] is not counted among the kept tokens, as stock models have dropped it. Similarity is measured on
    the features before the projector. Towers without [CLS] give the attention that a patch receives.

    Parameters
    ----------
    visual : str
        What groups and similarities come from: ``"tower"``, the projector's input, or ``"projected"``, its output, for
        models whose projector merges tokens.
    layer : int or float
        Block of the vision tower that gives the attention.

    Raises
    ------
    ValueError
        If a parameter is out of range or unknown.
    """

    summary = "Groups by principal component, duplicates suppressed inside of each."
    paper = "2603.09480"
    positions = "compact"

    visual: str = "tower"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("visual", self.visual, VISUAL)
        object.__setattr__(self, "needs_projector", self.visual == "tower")

    def select(self, ctx: VisualContext, budget: Tensor) -> Tensor:
        """Slots (I, K) of each view, group by group."""
        views = Views.of(ctx)
        x = finite(views.take(visual_features(ctx, self.visual, self.name)), views.valid, "features")
        scores = views.take(self.read_scores(ctx))
        quota = views.share(budget, equal=True)
        picked = quota.new_full((len(quota), max(1, int(quota.max()))), -1)
        for view, count in enumerate(quota.tolist()):  # one by one: components of padded tokens would be rounded apart
            if count:
                here = views.valid[view].nonzero()[:, 0]
                chosen = choose(x[view, here], scores[view, here], count, count)
                picked[view, :count] = here[chosen.order]
        return views.pick(picked)


class Choice(NamedTuple):
    """What `choose` finds.

    Attributes
    ----------
    order : Tensor
        (count,) long: chosen tokens, group by group; in a group the survivors by score, then suppressed ones.
    group : Tensor
        (N,) long.
    survivors, budget : Tensor
        (G,) long: tokens of each group that were not suppressed, and that are chosen.
    """

    order: Tensor
    group: Tensor
    survivors: Tensor
    budget: Tensor


@selection
def choose(x: Tensor, scores: Tensor, nominal: int, count: int, group: Tensor | None = None) -> Choice:
    """Choose ``count`` tokens of one view.

    Parameters
    ----------
    x : Tensor
        (N, C).
    scores : Tensor
        (N,).
    nominal : int
        The budget that sets the number of groups, the threshold and the caps: a quarter of it, ``nominal / 32`` times
        the mean cosine of different tokens, and 5 a group for each 64 of it. The authors count [CLS] in it.
    count : int
        At most N.
    group : Tensor, optional
        (N,) long, to be used instead of the principal components.
    """
    groups = max(1, nominal // 4)
    if group is None:
        groups = min(groups, *x.shape)
        group = components(x, groups)
    unit = functional.normalize(x.float(), dim=1, eps=EPS)
    stay = survivors(unit, scores, group, groups, nominal / 32 * mean_cosine(unit))
    sizes, survived = (torch.bincount(part, minlength=groups) for part in (group, group[stay]))
    budget = torch.tensor(shared(sizes.tolist(), survived.tolist(), nominal, count), device=x.device)
    order = scores.sort(descending=True, stable=True).indices
    order = order[(~stay[order]).to(torch.uint8).sort(stable=True).indices]
    order = order[group[order].sort(stable=True).indices]
    place = torch.arange(len(x), device=x.device) - (sizes.cumsum(0) - sizes)[group[order]]
    return Choice(order[place < budget[group[order]]], group, survived, budget)


def components(x: Tensor, count: int) -> Tensor:
    """(N,) long: which of the first ``count`` principal components of ``sigmoid(x)`` (N, C) a token weighs most in.

    Tokens are the variables, channels the samples, so that each token is centred over its channels. In float64, from
    the products of tokens or those of channels, whichever are fewer.
    """
    a = x.double().sigmoid()
    a = a - a.mean(1, keepdim=True)
    if a.shape[0] <= a.shape[1]:
        weight = torch.linalg.eigh(a @ a.T).eigenvectors
    else:
        values, vectors = torch.linalg.eigh(a.T @ a)
        weight = a @ vectors / values.clamp(min=1e-12).sqrt()
    return weight[:, -count:].flip(1).abs().argmax(1)


def mean_cosine(unit: Tensor) -> float:
    """Mean cosine of two different ones of the unit vectors (N, C), 0 for a single one."""
    tokens = len(unit)
    if tokens < 2:
        return 0.0
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (tokens * (tokens - 1)))


def survivors(unit: Tensor, scores: Tensor, group: Tensor, groups: int, threshold: float) -> Tensor:
    """(N,) bool: what is left when the best of each group drops those of it that resemble it, then the next, and so on.

    Parameters
    ----------
    unit : Tensor
        (N, C) unit vectors.
    scores : Tensor
        (N,).
    group : Tensor
        (N,) long in [0, groups).
    groups : int
        G.
    threshold : float
        Cosine.
    """
    tokens = len(unit)
    order = scores.sort(descending=True, stable=True).indices
    rank = order.argsort()
    waiting = torch.ones_like(group, dtype=torch.bool)
    stay = ~waiting
    while bool(waiting.any()):  # a step for each survivor of the group that has most
        best = rank.new_full((groups,), tokens)
        best = best.scatter_reduce(0, group, torch.where(waiting, rank, tokens), "amin")
        winner = best[group]  # rank of the best waiting token of one's own group
        similar = (unit * unit[order[winner.clamp(max=tokens - 1)]]).sum(1)
        won = rank == winner
        stay, waiting = stay | won, waiting & ~won & (similar <= threshold)
    return stay


def shared(sizes: list[int], survived: list[int], nominal: int, count: int) -> list[int]:
    """Tokens of each group: one, and more in proportion to its survivors, up to a cap; ``count`` together.

    Parameters
    ----------
    sizes, survived : list of int
        Tokens and survivors of each group.
    nominal : int
        Caps are ``5 * ceil(nominal / 64)`` or the survivors, and rise evenly until they sum up to it.
    count : int
        At most the sum of the sizes.
    """
    cap = [min(5 * math.ceil(nominal / 64), size, left) for size, left in zip(sizes, survived, strict=True)]
    while sum(cap) < min(nominal, sum(sizes)):
        cap = [min(most + 1, size) for most, size in zip(cap, sizes, strict=True)]
    lower = [min(1, size) for size in sizes]
    part = torch.tensor(survived, dtype=torch.float32, device="cpu")
    ends = ((part / part.sum()).cumsum(0) * (count - sum(lower))).round().long()
    share = ends.diff(prepend=ends.new_zeros(1)).tolist()
    budget = [min(low + more, most) for low, more, most in zip(lower, share, cap, strict=True)]
    for number in sorted(range(len(cap)), key=lambda number: -survived[number]):
        budget[number] += min(cap[number] - budget[number], count - sum(budget))
    return budget
