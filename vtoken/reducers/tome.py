# SPDX-License-Identifier: Apache-2.0
"""ToMe: average similar tokens, weighted by what is behind them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtoken.context import VisualContext
from vtoken.reducers.base import Assignment, MergeReducer
from vtoken.reducers.checks import check_count
from vtoken.reducers.encoded import EncoderReducer
from vtoken.reducers.rounds import merge_views
from vtoken.registry import register


@register("tome")
@dataclass(frozen=True)
class ToMe(EncoderReducer, MergeReducer):
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
    reads = ("keys",)

    rounds: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("rounds", self.rounds)

    def assign(self, ctx: VisualContext, budget: Tensor) -> Assignment:
        """Merge by the similarity of the keys."""
        return merge_views(ctx, self.read(ctx, "keys"), budget, self.rounds, weighted=True)
