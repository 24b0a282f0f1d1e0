# SPDX-License-Identifier: Apache-2.0
"""ToMe: average similar tokens, weighted by what is behind them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtoken.context import VisualContext
from vtoken.encoder import EncoderRead
from vtoken.reducers.base import Assignment, MergeReducer
from vtoken.reducers.checks import check_block, check_count
from vtoken.reducers.rounds import merge_views
from vtoken.registry import register


@register("tome")
@dataclass(frozen=True)
class ToMe(MergeReducer):
    """Token merging (arXiv 2210.09461), before the language model.

    The original merges inside the vision tower, at every block, which breaks the grid that a language model's
    projector and packing expect. Here the same size-weighted bipartite merging runs in rounds on the projected
    features of each view, with the keys of one tower block as its metric.

    Parameters
    ----------
    rounds : int
        Merging rounds; more are added where a round would merge over half of the tokens.
    layer : int or float
        Block of the vision tower whose keys, mean over heads, are compared.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """

    summary = "Bipartite merging by key similarity, weighted by size."
    paper = "2210.09461"

    rounds: int = 8
    layer: int | float = -2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("rounds", self.rounds)
        check_block("layer", self.layer)

    def encoder_reads(self) -> tuple[EncoderRead, ...]:
        return (EncoderRead("keys", self.layer),)

    def assign(self, ctx: VisualContext, budget: Tensor) -> Assignment:
        """Merge by the similarity of the keys."""
        return merge_views(ctx, ctx.encoder[self.encoder_reads()[0]], budget, self.rounds, weighted=True)
