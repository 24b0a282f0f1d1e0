# SPDX-License-Identifier: Apache-2.0
"""DivPrune: the subset with the largest smallest distance."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtoken.context import VisualContext
from vtoken.ops import max_min
from vtoken.reducers.base import SelectReducer
from vtoken.registry import register


@register("divprune")
@dataclass(frozen=True)
class DivPrune(SelectReducer):
    """DivPrune (arXiv 2503.02175): greedy max-min diversity of the projected features.

    Picked tokens leave the choice; in the authors' code identical tokens are picked again and the budget is missed.
    Newlines are no candidates here.

    Raises
    ------
    ValueError
        If ``keep`` is out of range.
    """

    summary = "Greedy max-min diversity of the features."
    paper = "2503.02175"
    positions = "compact"

    keep: float | int = 0.098

    def select(self, ctx: VisualContext, budget: Tensor) -> Tensor:
        """Slots (I, K) in pick order."""
        return max_min(ctx.features, budget, ctx.candidates)
