# SPDX-License-Identifier: Apache-2.0
"""VisPruner: important tokens by [CLS] attention, diverse ones from the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtoken.context import VisualContext
from vtoken.ops import top_k
from vtoken.ops.common import index_mask
from vtoken.ops.cosines import CHUNK, Cosines
from vtoken.ops.loop import one_thread
from vtoken.ops.ragged import compact, gather
from vtoken.precision import selection
from vtoken.reducers.base import SelectReducer
from vtoken.reducers.checks import check_number
from vtoken.reducers.encoded import EncoderReducer
from vtoken.reducers.views import Views
from vtoken.registry import register

STEP = 8  # tokens that one round of thinning removes
NEAREST = 16  # neighbours of a token that are looked through before all of them are


@register("vispruner")
@dataclass(frozen=True)
class VisPruner(EncoderReducer, SelectReducer):
    """VisPruner (arXiv 2412.01818): half of the budget by attention, the other half by removing duplicates.

    The rest, in order of attention, is thinned: of its even-placed tokens the eight most similar to an odd-placed one
    go, round after round. Each view gets the same budget. Similarity is measured on the projected features (the
    authors take them before the projector), and odd numbers of tokens, which their code cannot split, are allowed.

    Parameters
    ----------
    important : float
        Share of the budget that goes by attention.
    layer : int or float
        Block of the vision tower.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """

    summary = "Important tokens by attention, then diverse ones by thinning out duplicates."
    paper = "2412.01818"
    positions = "compact"

    important: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("important", self.important, 0, 1)

    def select(self, ctx: VisualContext, budget: Tensor) -> Tensor:
        """Slots (I, K) of each view's important, then diverse tokens."""
        views = Views.of(ctx)
        scores = views.take(self.read_scores(ctx))
        quota = views.share(budget, equal=True)
        order = top_k(scores, views.valid.sum(1), views.valid)
        head = (quota.float() * self.important).long()
        place = torch.arange(order.shape[1], device=order.device)
        rest = thin(views.take(ctx.features), order.masked_fill(place < head[:, None], -1), quota - head, views.valid)
        return views.pick(torch.cat([order.masked_fill(place >= head[:, None], -1), rest], 1))


@selection
def thin(features: Tensor, order: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Remove duplicates from a list until ``target`` tokens are left.

    Parameters
    ----------
    features : Tensor
        (B, N, D).
    order : Tensor
        (B, R) long: the list; -1 entries are skipped.
    target : Tensor
        (B,) long.
    valid : Tensor
        (B, N) bool.

    Returns
    -------
    Tensor
        (B, max target) long in list order, padded with -1.
    """
    order = _front(order)
    target = torch.minimum(target, (order >= 0).sum(1))
    listed = gather(features, order.clamp(min=0))
    cosines = Cosines(listed, (order >= 0) & valid.gather(1, order.clamp(min=0))).whole()
    places = torch.arange(order.shape[1], device=order.device).expand_as(order).masked_fill(order < 0, -1)
    while bool(((places >= 0).sum(1) > target).any()):
        places = _halved(cosines, places, target)
    kept = order.gather(1, places.clamp(min=0)).masked_fill(places < 0, -1)
    return kept[:, : int(target.max())]


def _halved(cosines: Cosines, order: Tensor, target: Tensor) -> Tensor:
    """The list after rounds that reach the target or leave at most half of the longest one that is above its own."""
    near = _Neighbours(cosines, order)
    count = (order >= 0).sum(1)
    least = torch.maximum(target, count[count > target].max() // 2)
    with one_thread(order.device, order.numel() * NEAREST):
        while bool(((order >= 0).sum(1) > least).any()):
            order = _round(near, order, target)
    return order[:, : int((order >= 0).sum(1).max())]


def _round(near: _Neighbours, order: Tensor, target: Tensor) -> Tensor:
    count = (order >= 0).sum(1)
    remove = (count - target).clamp(max=STEP)
    remove = torch.minimum(remove, (count + 1) // 2)
    even, odd = order[:, 0::2], order[:, 1::2]
    similar = near.similarity(even, odd)
    ranked = similar.masked_fill(even < 0, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    place = torch.arange(even.shape[1], device=order.device)
    even = even.gather(1, ranked).masked_fill(place < remove[:, None], -1)
    thinned = _front(torch.cat([even, odd], 1))
    done = remove == 0
    return torch.where(done[:, None], order, thinned)


class _Neighbours:
    """The most similar tokens of each listed one, among the listed: the nearest of a half of them is nearly always one
    of these few."""

    def __init__(self, cosines: Cosines, order: Tensor) -> None:
        self.cosines = cosines
        rows, tokens = order.shape[0], cosines.shape[1]
        few = min(NEAREST, order.shape[1])
        outside = torch.full(cosines.shape, float("-inf"), dtype=torch.float32, device=order.device)
        outside.masked_fill_(index_mask(order, tokens), 0.0)
        self.value = outside.new_full((rows, tokens, few), float("-inf"))
        self.index = order.new_zeros(rows, tokens, few)
        for part in order.clamp(min=0).split(CHUNK, 1):
            near = (cosines.columns(part) + outside[:, None]).topk(few)
            at = part[..., None].expand_as(near.indices)
            self.value.scatter_(1, at, near.values)
            self.index.scatter_(1, at, near.indices)
        self.index += tokens * torch.arange(rows, device=order.device)[:, None, None]  # of all rows' tokens in a line

    def similarity(self, tokens: Tensor, others: Tensor) -> Tensor:
        """(B, E): the largest of each of ``tokens`` (B, E) to one of ``others`` (B, O); -1 entries have no part."""
        there = index_mask(others, self.cosines.shape[1])
        at = tokens.clamp(min=0)
        index = gather(self.index, at)
        hit = there.flatten().index_select(0, index.flatten()).view_as(index)
        found = gather(self.value, at).masked_fill_(~hit, float("-inf")).amax(2)
        missing = found.isinf() & (tokens >= 0)
        if bool(missing.any()):
            slots, real = compact(missing)
            columns = self.cosines.columns(at.gather(1, slots)).masked_fill(~there[:, None], float("-inf"))
            spare = torch.where(real, slots, tokens.shape[1])
            found = torch.cat([found, found[:, :1]], 1).scatter(1, spare, columns.amax(2))[:, :-1]
        return found


def _front(order: Tensor) -> Tensor:
    """Entries of (B, R) that are not -1 first, in order."""
    return order.gather(1, (order < 0).to(torch.uint8).sort(dim=1, stable=True).indices)
