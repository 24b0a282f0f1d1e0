# SPDX-License-Identifier: Apache-2.0
"""SparseVLM: text tokens rate visual ones at a few layers; what they drop is recycled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtoken.context import Attention, Cut, VisualContext
from vtoken.ops import cluster_merge, density_peaks, top_k
from vtoken.ops.ragged import gather
from vtoken.reducers.base import KeepReducer, check_features, check_scores, stage_budget, with_newlines
from vtoken.reducers.checks import check_count, check_flag, layer_at, places
from vtoken.reducers.rows import mean_over_rows, question_rows, rows_at
from vtoken.registry import register

RATERS = "sparsevlm raters"


@register("sparsevlm")
@dataclass(frozen=True)
class SparseVLM(KeepReducer):
    """SparseVLM (arXiv 2410.04417, version 1): text-guided pruning at three decoder layers, with token recycling.

    Question tokens that relate to the picture more than the average are the raters (chosen once, on the input
    embeddings). After each layer of ``at``, the visual tokens they attend to stay; the best 30 % of the others are
    clustered and a mean of each cluster goes on, in the place of its centre. Each stage shrinks the image by the same
    factor, and unlike in the authors' code the recycled tokens count within the budget and keep a position id.

    Parameters
    ----------
    at : tuple
        Decoder layers, as numbers or shares of the depth; the authors' 2, 6 and 15 of 32.
    recycle : bool
        Whether dropped tokens are clustered.
    heads : int or None
        Use only so many heads, those with the most attention to the picture (SparseVLM+, 14); None uses all.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """

    summary = "Text raters choose, dropped tokens are clustered and recycled."
    paper = "2410.04417"
    uses_text = True

    at: tuple[int | float, ...] = (2 / 32, 6 / 32, 15 / 32)
    recycle: bool = True
    heads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "at", places("at", self.at))
        check_flag("recycle", self.recycle)
        if self.heads is not None:
            check_count("heads", self.heads)

    def _cuts(self, depth: int) -> tuple[int, ...]:
        return tuple(sorted({min(layer_at(place, depth), depth - 2) + 1 for place in self.at})) if depth > 1 else ()

    def layers(self, depth: int) -> tuple[int, ...]:
        return (0, *self._cuts(depth))

    def taps(self, depth: int) -> dict[int, str]:
        return {layer - 1: "question" for layer in self._cuts(depth)}

    def at_layer(self, layer: int, ctx: VisualContext) -> Cut | None:
        """Choose the raters at layer 0, where everything stays; cut at the others."""
        if layer == 0:
            return Cut(ctx.valid, notes={RATERS: raters(ctx)})
        cuts = self._cuts(ctx.depth)
        wanted = stage_budget(ctx, self.keep, cuts.index(layer) + 1, len(cuts))
        budget = torch.minimum(wanted, ctx.candidates.sum(1))
        scores = check_scores(self._scores(ctx, layer), ctx, self.name)
        if self.recycle:
            cut = recycle(ctx, scores, budget, self.name)
        else:
            cut = ctx.cut(top_k(scores, budget, ctx.candidates))
        return Cut(with_newlines(cut.keep, ctx, wanted), cut.features)

    def _scores(self, ctx: VisualContext, layer: int) -> Tensor:
        attention = rows_at(ctx, layer - 1)
        chosen = ctx.notes[RATERS].to(attention.valid.device)
        if self.heads is not None:
            visual = attention.probabilities * ctx.visual[:, None, None] * attention.valid[:, None, :, None]
            best = strongest_heads(visual, self.heads)
            probabilities = attention.probabilities.gather(
                1, best[..., None, None].expand(-1, -1, *attention.probabilities.shape[2:])
            )
            attention = Attention(probabilities, attention.valid)
        return ctx.per_item(mean_over_rows(attention, chosen))


def raters(ctx: VisualContext) -> Tensor:
    """(B, R) bool: question tokens, right aligned, that relate to the picture more than the mean (Eq. 3)."""
    index, valid = question_rows(ctx)
    hidden = ctx.hidden.float()
    return relevant(hidden, ctx.visual, gather(hidden, index), valid)


def relevant(states: Tensor, visual: Tensor, text: Tensor, valid: Tensor) -> Tensor:
    """Text tokens with more than the mean of ``softmax_text(V Tᵀ)``, averaged over visual tokens.

    Parameters
    ----------
    states : Tensor
        (B, S, D).
    visual : Tensor
        (B, S) bool.
    text : Tensor
        (B, R, D).
    valid : Tensor
        (B, R) bool.

    Returns
    -------
    Tensor
        (B, R) bool.
    """
    share = (states @ text.mT).masked_fill(~valid[:, None], float("-inf")).softmax(2)
    share = share.masked_fill(~visual[..., None], 0.0).sum(1) / visual.sum(1, keepdim=True).clamp(min=1)
    mean = share.masked_fill(~valid, 0.0).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)
    chosen = (share > mean) & valid
    return torch.where(chosen.any(1, keepdim=True), chosen, valid)  # equal shares: nobody stands out, all rate


def strongest_heads(attention: Tensor, count: int) -> Tensor:
    """(B, count) long: heads with the largest sum of (B, H, R, N), descending."""
    return top_k(attention.float().sum((2, 3)), count)


def recycle(ctx: VisualContext, scores: Tensor, wanted: Tensor, name: str) -> Cut:
    """Keep the best tokens and the cluster means of the best of the rest: ``wanted`` (I,) together."""
    present = ctx.candidates.sum(1)
    gone = present - wanted
    clusters = torch.where(gone > 0, pool_size(gone) // 10 + 1, 0)
    clusters = torch.minimum(clusters, (wanted - 1).clamp(min=0))
    keep = ctx.cut(top_k(scores, wanted - clusters, ctx.candidates)).keep
    dropped = ctx.candidates & ~keep
    pool = top_k(scores, torch.where(clusters > 0, pool_size(dropped.sum(1)), 0), dropped)
    if pool.shape[1] == 0:
        return ctx.cut(keep)
    inside = pool >= 0
    x = check_features(gather(ctx.features, pool.clamp(min=0)), inside, name)
    centres = density_peaks(x, clusters, inside)
    merged = cluster_merge(x, clusters, inside)
    slots = pool.gather(1, centres.clamp(min=0)).masked_fill(centres < 0, ctx.longest)
    features = torch.cat([ctx.features, ctx.features[:, :1]], 1).float()
    features.scatter_(1, slots[..., None].expand_as(merged.features), merged.features)
    keep = keep | ctx.cut(slots.masked_fill(slots == ctx.longest, -1)).keep
    return Cut(keep, features[:, :-1].to(ctx.hidden.dtype))


def pool_size(dropped: Tensor) -> Tensor:
    """Tokens to recycle of so many dropped ones: 30 %, and one."""
    return 3 * dropped // 10 + 1
