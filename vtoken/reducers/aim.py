# SPDX-License-Identifier: Apache-2.0
"""AIM: merge before the language model, then prune inside it by PageRank until no visual token is left."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtoken.context import Attention, Cut, VisualContext
from vtoken.ops import page_rank
from vtoken.ops.ragged import compact, gather
from vtoken.reducers.base import Assignment, MergeReducer, best_candidates
from vtoken.reducers.checks import check_count, check_number, check_place, layer_at
from vtoken.reducers.rounds import merge_views
from vtoken.reducers.rows import rows_at
from vtoken.registry import register


@register("aim")
@dataclass(frozen=True)
class AIM(MergeReducer):
    """AIM (arXiv 2412.03248): adaptive inference by token merging and pruning.

    Before the language model, similar neighbours of a view (frame) are averaged in rounds of at most half of its
    tokens until ``keep`` of them are left. Inside it, from layer ``first`` on, the tokens with the highest PageRank
    stay, an equal number less after each layer, none from layer ``last`` on. Text is never dropped. The authors hide
    pruned tokens by a mask and let them act as queries; here their rows are gone. The budget of the merge is exact,
    where theirs is a power of two.

    Parameters
    ----------
    first, last : int or float
        The layer after which pruning begins and the first one without visual tokens, as numbers or shares of the
        depth; the authors' 14 and 22 of 28.
    temperature : float
        Of the softmax that PageRank follows; it is in the authors' code, not in the paper.
    iterations : int
        Of PageRank.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """

    summary = "Merging before the decoder, PageRank pruning inside it."
    paper = "2412.03248"
    uses_text = True

    first: int | float = 0.5
    last: int | float = 22 / 28
    temperature: float = 0.1
    iterations: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_place("first", self.first)
        check_place("last", self.last)
        if type(self.first) is type(self.last) and self.first >= self.last:
            raise ValueError(f"first={self.first} must come before last={self.last}.")
        check_number("temperature", self.temperature, 0, above=True)
        check_count("iterations", self.iterations)

    def assign(self, ctx: VisualContext, budget: Tensor) -> Assignment:
        """Merge by the similarity of the features."""
        return merge_views(ctx, ctx.features, budget)

    def _span(self, depth: int) -> tuple[int, int]:
        last = min(layer_at(self.last, depth), depth - 1)
        return min(layer_at(self.first, depth), last), last

    def layers(self, depth: int) -> tuple[int, ...]:
        first, last = self._span(depth)
        return tuple(range(first + 1, last + 1))

    def taps(self, depth: int) -> dict[int, str]:
        return {layer - 1: "all" for layer in self.layers(depth)}

    def at_layer(self, layer: int, ctx: VisualContext) -> Cut | None:
        """Keep the tokens of highest PageRank in layer ``layer - 1``."""
        first, last = self._span(ctx.depth)
        wanted = ctx.budget(self.keep) * (last - layer) // (last - first)
        rank = importance(rows_at(ctx, layer - 1), ctx.visual | ctx.text, self.temperature, self.iterations)
        return ctx.cut(best_candidates(ctx.per_item(rank), wanted, ctx, self.name))


def importance(attention: Attention, real: Tensor, temperature: float, iterations: int) -> Tensor:
    """PageRank of every token that is left.

    Parameters
    ----------
    attention : Attention
        Rows of all real tokens: (B, H, R, S) softmaxed.
    real : Tensor
        (B, S) bool: tokens that are not padding; R of them in the longest row.

    Returns
    -------
    Tensor
        (B, S): 0 on the padding.
    """
    index, valid = compact(real)
    # the logarithm of a softmax differs from its logits by a constant a row, which the next softmax removes
    logits = gather(attention.probabilities.float(), index, dim=3).log()
    rank = page_rank(logits, temperature, iterations, valid=valid)
    out = rank.new_zeros(len(real), real.shape[1] + 1)
    return out.scatter_(1, torch.where(valid, index, real.shape[1]), rank)[:, :-1]
