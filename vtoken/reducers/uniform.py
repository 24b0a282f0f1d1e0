# SPDX-License-Identifier: Apache-2.0
"""Evenly spaced tokens: the control without any content."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtoken.context import VisualContext
from vtoken.reducers.base import SelectReducer
from vtoken.reducers.placed import PlacedReducer
from vtoken.registry import register


@register("uniform")
@dataclass(frozen=True)
class Uniform(PlacedReducer, SelectReducer):
    """Keep every (N / K)-th token of each image in raster order, starting half a step in.

    Parameters
    ----------
    layer : int, float or None
        First decoder layer without the dropped tokens, at least 1, or a share of the depth; None acts before the
        language model.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """

    summary = "Evenly spaced tokens (control)."

    def select(self, ctx: VisualContext, budget: Tensor) -> Tensor:
        """Mask (I, N) of the tokens whose rank crosses a multiple of N / K."""
        count, budget = ctx.candidates.sum(1)[:, None], budget[:, None]
        rank = ctx.candidates.cumsum(1)
        count = count.clamp(min=1)
        half = count // 2
        crossed = (rank * budget + half) // count > ((rank - 1) * budget + half) // count
        return crossed & ctx.candidates
