# SPDX-License-Identifier: Apache-2.0
"""Reducers that ask, not answer: they drop by place alone, so that no rounding changes what they choose, or only look.

They use the public interface of reducers and know nothing of the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtoken.context import Cut, VisualContext
from vtoken.reducers.base import Reducer


@dataclass(frozen=True)
class Places(Reducer):
    """Keeps about half of the tokens of each item before the decoder, and about half of the rest at a layer.

    Parameters
    ----------
    layer : int or None
        The second cut; None for none.
    """

    name = "places"
    layer: int | None = None

    def layers(self, depth: int) -> tuple[int, ...]:
        return () if self.layer is None else (self.layer,)

    def before_llm(self, ctx: VisualContext) -> Cut:
        return _scattered(ctx, 7, 13)

    def at_layer(self, layer: int, ctx: VisualContext) -> Cut:
        return _scattered(ctx, 11, 17)


def _scattered(ctx: VisualContext, factor: int, modulus: int) -> Cut:
    """Keep the slots whose multiple falls in the lower half, so that neighbours and columns are treated unequally."""
    slots = torch.arange(ctx.longest, device=ctx.valid.device)
    return Cut(ctx.valid & (slots * factor % modulus <= modulus // 2))


@dataclass(frozen=True)
class Without(Reducer):
    """Drops one token, by its number among all visual tokens of the prompt."""

    name = "without"
    token: int = 0

    def before_llm(self, ctx: VisualContext) -> Cut:
        number = ctx.valid.flatten().cumsum(0).view_as(ctx.valid) - 1
        return Cut(ctx.valid & (number != self.token))


@dataclass(frozen=True)
class Looks(Reducer):
    """Drops nothing; notes the attention of the last token at a layer.

    Parameters
    ----------
    layer : int
        Which.
    coming : bool
        Whether it is read before the layer runs, or when it has run.

    Attributes
    ----------
    seen : dict
        ``"rows"``: (H, K) of the first prompt.
    """

    name = "looks"
    layer: int = 1
    coming: bool = True
    seen: dict[str, Tensor] = field(default_factory=dict, init=False, compare=False)

    def layers(self, depth: int) -> tuple[int, ...]:
        return (self.layer, depth) if self.coming else (depth,)

    def taps(self, depth: int) -> dict[int, str]:
        return {} if self.coming else {self.layer: "last"}

    def at_layer(self, layer: int, ctx: VisualContext) -> None:
        if layer == ctx.depth:
            if not self.coming:
                self.seen["rows"] = ctx.attention[self.layer].probabilities[0, :, 0]
        else:
            assert ctx.peek is not None, "a context at a layer can look ahead"
            self.seen["rows"] = ctx.peek("last").probabilities[0, :, 0]
