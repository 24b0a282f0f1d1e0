# SPDX-License-Identifier: Apache-2.0
"""SCOPE: tokens that cover the others, weighted by saliency."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtoken.context import VisualContext
from vtoken.ops import coverage
from vtoken.reducers.base import SelectReducer
from vtoken.reducers.checks import check_choice, check_number
from vtoken.reducers.encoded import EncoderReducer
from vtoken.reducers.views import Views
from vtoken.registry import register

COMBINE = ("multiply", "add")


@register("scope")
@dataclass(frozen=True)
class SCOPE(EncoderReducer, SelectReducer):
    """SCOPE (arXiv 2510.24214): greedy coverage of all tokens, weighted by [CLS] attention.

    Each view gets the same budget. Coverage is measured on the projected features (the authors take them before the
    projector); the attention is a mean over heads, which matters for ``combine="add"`` only.

    Parameters
    ----------
    alpha : float
        Exponent of the attention.
    combine : str
        ``"multiply"``: gain * attention ** alpha; ``"add"``: their sum.
    layer : int or float
        Block of the vision tower.

    Raises
    ------
    ValueError
        If a parameter is out of range or unknown.
    """

    summary = "Greedy coverage of all tokens, weighted by attention."
    paper = "2510.24214"
    positions = "compact"

    alpha: float = 1.0
    combine: str = "multiply"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, 0)
        check_choice("combine", self.combine, COMBINE)

    def select(self, ctx: VisualContext, budget: Tensor) -> Tensor:
        """Slots (I, K) in pick order, view by view."""
        views = Views.of(ctx)
        scores = views.take(self.read_scores(ctx))
        quota = views.share(budget, equal=True)
        picks = coverage(views.take(ctx.features), scores, quota, self.alpha, views.valid, self.combine)
        return views.pick(picks)
