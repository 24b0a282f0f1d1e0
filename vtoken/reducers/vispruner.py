# SPDX-License-Identifier: Apache-2.0
"""VisPruner: important tokens by [CLS] attention, diverse ones from the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtoken.context import VisualContext
from vtoken.ops import top_k
from vtoken.ops.cosines import CHUNK, Cosines
from vtoken.ops.loop import one_thread
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
    thinned = []
    for x, listed, wanted, there in zip(features, order, target.tolist(), valid, strict=True):
        tokens = listed[listed >= 0]
        thinned.append(tokens[_thinned(Cosines(x[tokens][None], there[tokens][None]), wanted)])
    return pad_sequence(thinned, batch_first=True, padding_value=-1)


def _thinned(cosines: Cosines, target: int) -> Tensor:
    """(K,) long: which of the (1, N) listed tokens are left, in list order."""
    order = torch.arange(cosines.shape[1], device=cosines.inverse.device)
    cosines = cosines.whole() if len(order) > target else cosines  # of a list that is short enough nothing is asked
    with one_thread(order.device, order.numel() * NEAREST):
        while len(order) > target:
            near, half = _Neighbours(cosines, order), len(order) // 2  # of fewer tokens, other ones are near
            while len(order) > max(target, half):
                even, odd = order[0::2], order[1::2]
                ranked = near.similarity(even, odd).sort(descending=True, stable=True).indices
                order = torch.cat([even[ranked[min(STEP, len(order) - target) :]], odd])
    return order


class _Neighbours:
    """The most similar tokens of each listed one, among the listed, nearest first: that of a half of them is nearly
    always one of these few."""

    def __init__(self, cosines: Cosines, order: Tensor) -> None:
        self.cosines = cosines
        tokens, few = cosines.shape[1], min(NEAREST, len(order))
        outside = torch.full((tokens,), float("-inf"), dtype=torch.float32, device=order.device)
        outside[order] = 0.0
        self.value = outside.new_zeros(tokens, few)
        self.index = order.new_zeros(tokens, few)
        for part in order.split(CHUNK):
            self.value[part], self.index[part] = (cosines.columns(part[None])[0] + outside).topk(few)

    def similarity(self, tokens: Tensor, others: Tensor) -> Tensor:
        """(E,): the largest of each of ``tokens`` (E,) to one of ``others`` (O,)."""
        there = torch.zeros(self.cosines.shape[1], dtype=torch.bool, device=tokens.device)
        there[others] = True
        hit = there[self.index[tokens]]
        found = torch.where(hit, self.value[tokens], float("-inf")).amax(1)
        missing = (found == float("-inf")).nonzero()[:, 0]
        if len(missing):
            found[missing] = self.cosines.columns(tokens[missing][None])[0].masked_fill(~there, float("-inf")).amax(1)
        return found
