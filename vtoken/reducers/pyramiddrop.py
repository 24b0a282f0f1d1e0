# SPDX-License-Identifier: Apache-2.0
"""PyramidDrop: halve the visual tokens at a few depths of the decoder."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtoken.context import VisualContext
from vtoken.reducers.base import LayerReducer
from vtoken.reducers.checks import layer_at, places
from vtoken.registry import register


@register("pyramiddrop")
@dataclass(frozen=True)
class PyramidDrop(LayerReducer):
    """PyramidDrop (arXiv 2410.17247): rank by the last instruction token at the entry of a few decoder layers.

    Queries and keys are those of the coming layer on its own input. Each stage shrinks the image by the same factor
    and the last one reaches ``keep``: with three stages 0.125 gives the authors' 0.5, 0.25, 0.125. Kept tokens keep
    their position ids, which the authors renumber.

    Parameters
    ----------
    at : tuple
        Decoder layers, as numbers or shares of the depth; the authors' 8, 16 and 24 of 32.

    Raises
    ------
    ValueError
        If ``keep`` or a layer is out of range.
    """

    summary = "The last token's attention at several depths, halving each time."
    paper = "2410.17247"
    uses_text = True

    keep: float | int = 0.125
    at: tuple[int | float, ...] = (0.25, 0.5, 0.75)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "at", places("at", self.at))

    def layers(self, depth: int) -> tuple[int, ...]:
        return tuple(sorted({layer_at(place, depth) for place in self.at}))

    def peeks(self, depth: int) -> tuple[int, ...]:
        return self.layers(depth)

    def score(self, layer: int, ctx: VisualContext) -> Tensor:
        """Attention (I, N) of the last token in the coming layer, mean over heads."""
        assert ctx.peek is not None
        return ctx.per_item(ctx.peek("last").probabilities.float().mean(1)[:, 0])
