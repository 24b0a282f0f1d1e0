# SPDX-License-Identifier: Apache-2.0
"""FastV: drop what the last token does not attend to, after two or three layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtoken.context import VisualContext
from vtoken.reducers.base import LayerReducer
from vtoken.reducers.checks import check_place, layer_at
from vtoken.reducers.rows import rows_at
from vtoken.registry import register


@register("fastv")
@dataclass(frozen=True)
class FastV(LayerReducer):
    """FastV (arXiv 2403.06764): rank visual tokens by the last token's attention in an early decoder layer.

    Layer ``layer - 1`` is the only one whose attention is looked at, in one row; tokens are dropped before ``layer``
    and keep their position ids.

    Parameters
    ----------
    layer : int or float
        First decoder layer without the dropped tokens, at least 1, or a share of the depth.

    Raises
    ------
    ValueError
        If ``keep`` or ``layer`` is out of range.
    """

    summary = "The last token's attention in an early decoder layer."
    paper = "2403.06764"
    uses_text = True

    keep: float | int = 0.5
    layer: int | float = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_place("layer", self.layer, least=1)

    def layers(self, depth: int) -> tuple[int, ...]:
        return (max(1, layer_at(self.layer, depth)),)

    def taps(self, depth: int) -> dict[int, str]:
        return {layer - 1: "last" for layer in self.layers(depth)}

    def score(self, layer: int, ctx: VisualContext) -> Tensor:
        """Attention (I, N) of the last token, mean over heads."""
        return ctx.per_item(rows_at(ctx, layer - 1).probabilities.float().mean(1)[:, 0])
