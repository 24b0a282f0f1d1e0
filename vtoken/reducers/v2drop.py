# SPDX-License-Identifier: Apache-2.0
"""V2Drop: drop the visual tokens that a decoder layer hardly changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtoken.context import Cut, VisualContext
from vtoken.precision import selection
from vtoken.reducers.base import KeepReducer, best_candidates, stage_budget, with_newlines
from vtoken.reducers.checks import check_place, layer_at, places
from vtoken.registry import register

BEFORE = "v2drop before"
"""Note: the states of the visual tokens one layer before a cut."""


@register("v2drop")
@dataclass(frozen=True)
class V2Drop(KeepReducer):
    """V2Drop (arXiv 2509.01552): keep the tokens whose state a decoder layer moves farthest, without any attention.

    Before each layer of ``at``, the score of a token is the Euclidean distance between its inputs to this layer and to
    the one before. Each stage shrinks the image by the same factor, and the last one reaches ``keep``: 0.25 at two
    layers gives the authors' 0.5 and 0.25.

    Parameters
    ----------
    at : tuple
        Decoder layers, as numbers or shares of the depth, at least 1; the authors' 3 and 17 of 32.
    last : int, float or None
        Decoder layer from which on one token of each image is left, whatever ``keep`` says; the authors' 22 of 32,
        preset ``v2drop-32``. None leaves ``keep`` to the end.

    Raises
    ------
    ValueError
        If a parameter is out of range, or ``last`` does not come after the layers of ``at``.
    """

    summary = "Tokens that a decoder layer changes most, at several depths."
    paper = "2509.01552"
    uses_text = True  # states of tokens that have looked at the text before them, or in some models at all of it

    at: tuple[int | float, ...] = (3 / 32, 17 / 32)
    last: int | float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "at", places("at", self.at))
        for place in self.at:
            check_place("at", place, least=1)
        if self.last is not None:
            check_place("last", self.last, least=1)

    def _cuts(self, depth: int) -> tuple[int, ...]:
        return tuple(sorted({max(1, layer_at(place, depth)) for place in self.at}))

    def _last(self, depth: int) -> tuple[int, ...]:
        if self.last is None:
            return ()
        layer, cuts = layer_at(self.last, depth), self._cuts(depth)
        if layer <= cuts[-1]:
            raise ValueError(
                f"last={self.last!r} is layer {layer} of {depth}, not after layer {cuts[-1]}, the last one of "
                f"at={self.at!r}: give a later one."
            )
        return (layer,)

    def layers(self, depth: int) -> tuple[int, ...]:
        cuts = (*self._cuts(depth), *self._last(depth))
        return tuple(sorted({*cuts, *(layer - 1 for layer in cuts)}))

    def at_layer(self, layer: int, ctx: VisualContext) -> Cut | None:
        """Remember the states one layer before a cut; keep what they are farthest from at the cut."""
        cuts, last = self._cuts(ctx.depth), self._last(ctx.depth)
        keep = ctx.valid
        if layer in (*cuts, *last):
            if layer in last:
                wanted = ctx.to_choose(torch.ones_like(ctx.tokens))
            else:
                wanted = stage_budget(ctx, self.keep, cuts.index(layer) + 1, len(cuts))
            moved = variation(ctx.features, ctx.notes[BEFORE].to(ctx.hidden.device))
            keep = with_newlines(ctx.cut(best_candidates(moved, wanted, ctx, self.name)).keep, ctx, wanted)
        return Cut(keep, notes={BEFORE: ctx.features.detach() if layer + 1 in (*cuts, *last) else None})


@selection
def variation(now: Tensor, before: Tensor) -> Tensor:
    """(I, N) float32: Euclidean distance between the states (I, N, D) of each token at two layers."""
    return (now.float() - before.float()).norm(dim=2)
