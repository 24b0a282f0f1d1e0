# SPDX-License-Identifier: Apache-2.0
"""VisPruner: important tokens by [CLS] attention, diverse ones from the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtoken.context import VisualContext
from vtoken.ops import top_k
from vtoken.ops.common import unit_vectors
from vtoken.reducers.base import SelectReducer
from vtoken.reducers.checks import check_number
from vtoken.reducers.encoded import EncoderReducer
from vtoken.reducers.views import Views
from vtoken.registry import register

STEP = 8  # tokens that one round of thinning removes


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
    unit = unit_vectors(features, valid)
    order = _front(order)
    target = torch.minimum(target, (order >= 0).sum(1))
    while bool(((order >= 0).sum(1) > target).any()):
        order = _round(unit, order, target)
    return order[:, : int(target.max())]


def _round(unit: Tensor, order: Tensor, target: Tensor) -> Tensor:
    count = (order >= 0).sum(1)
    remove = (count - target).clamp(max=STEP)
    remove = torch.minimum(remove, (count + 1) // 2)
    even, odd = order[:, 0::2], order[:, 1::2]
    states = unit.gather(1, order.clamp(min=0)[..., None].expand(-1, -1, unit.shape[2]))
    similar = (states[:, 0::2] @ states[:, 1::2].mT).masked_fill((odd < 0)[:, None], float("-inf")).amax(2)
    ranked = similar.masked_fill(even < 0, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    place = torch.arange(even.shape[1], device=order.device)
    even = even.gather(1, ranked).masked_fill(place < remove[:, None], -1)
    thinned = _front(torch.cat([even, odd], 1))
    done = remove == 0
    return torch.where(done[:, None], order, thinned)


def _front(order: Tensor) -> Tensor:
    """Entries of (B, R) that are not -1 first, in order."""
    return order.gather(1, (order < 0).to(torch.uint8).sort(dim=1, stable=True).indices)
