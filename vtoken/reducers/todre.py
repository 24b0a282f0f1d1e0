# SPDX-License-Identifier: Apache-2.0
"""ToDRE: diverse tokens before the language model, none of them once the text stops looking."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from vtoken.context import Cut, VisualContext
from vtoken.ops import k_center, max_sum
from vtoken.reducers.base import SelectReducer
from vtoken.reducers.checks import check_choice, check_number
from vtoken.reducers.encoded import EncoderReducer
from vtoken.reducers.rows import leave, rows_at, text_to_visual
from vtoken.reducers.views import thumbnail
from vtoken.registry import register

VARIANTS = {"max_sum": max_sum, "k_center": k_center}


@register("todre")
@dataclass(frozen=True)
class ToDRE(EncoderReducer, SelectReducer):
    """ToDRE (arXiv 2505.18757): diversity before the language model, task relevance inside it.

    Stage 1 starts at the token that [CLS] attends to most, inside the thumbnail if there is one (Eq. 3), and adds
    diverse tokens over thumbnail and crops together (Eq. 4-6). Stage 2 runs decoder layer 7/8 of the depth with visual
    tokens and removes all of them after it if the question's attention to them (Eq. 8) is below ``tau``. Attention
    from visual to text tokens, the other half of Eq. 8, is zero for text behind the image and is not computed.

    Parameters
    ----------
    variant : str
        ``"max_sum"``: smallest sum of cosines to the picks (version 2 of the paper); ``"k_center"``: largest distance
        to the nearest pick (version 1).
    tau : float or None
        Threshold of stage 2; None leaves stage 2 out.
    layer : int or float
        Block of the vision tower whose attention gives the first pick.

    Raises
    ------
    ValueError
        If ``keep`` or ``tau`` is out of range or the variant is unknown.
    """

    summary = "Greedy diversity from a [CLS] pivot, then an exit when the text stops attending."
    paper = "2505.18757"
    uses_text = True

    variant: str = "max_sum"
    tau: float | None = 0.10
    layer: int | float = field(default=-1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("variant", self.variant, VARIANTS)
        if self.tau is not None:
            check_number("tau", self.tau, 0, 1)

    def select(self, ctx: VisualContext, budget: Tensor) -> Tensor:
        """Slots (I, K), the pivot first."""
        scores = self.read_scores(ctx)
        pivot = scores.masked_fill(~thumbnail(ctx), float("-inf")).argmax(1)
        return VARIANTS[self.variant](ctx.features, budget, start=pivot, valid=ctx.candidates)

    def layers(self, depth: int) -> tuple[int, ...]:
        return () if self.tau is None or depth < 2 else (exit_layer(depth) + 1,)

    def taps(self, depth: int) -> dict[int, str]:
        return {layer - 1: "question" for layer in self.layers(depth)}

    def at_layer(self, layer: int, ctx: VisualContext) -> Cut | None:
        """Drop every visual token of the rows whose question attends to them less than ``tau``."""
        if self.tau is None:
            return None
        return leave(ctx, text_to_visual(rows_at(ctx, layer - 1), ctx.visual) < self.tau)


def exit_layer(depth: int) -> int:
    """Layer 7/8 of the depth, and one that has a layer behind it."""
    return min(7 * depth // 8, depth - 2)
