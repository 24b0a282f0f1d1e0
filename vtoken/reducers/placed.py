# SPDX-License-Identifier: Apache-2.0
"""Base of the controls, which can act before the language model or at any layer of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from vtoken.context import Cut, VisualContext
from vtoken.reducers.base import KeepReducer
from vtoken.reducers.checks import check_place, layer_at


@dataclass(frozen=True)
class PlacedReducer(KeepReducer):
    """A reducer with a budget that is told where to act, as its choice needs nothing of the place.

    It stands before the base that does the cutting: ``class Mine(PlacedReducer, ScoreReducer)``.

    Parameters
    ----------
    layer : int, float or None
        First decoder layer without the dropped tokens, at least 1, or a share of the depth; None acts before the
        language model.

    Raises
    ------
    ValueError
        If ``layer`` names no decoder layer.
    """

    layer: int | float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None:
            check_place("layer", self.layer, least=1)

    @property
    def stages(self) -> tuple[str, ...]:
        return ("before_llm",) if self.layer is None else ("in_llm",)

    def layers(self, depth: int) -> tuple[int, ...]:
        return () if self.layer is None else (max(1, layer_at(self.layer, depth)),)

    def before_llm(self, ctx: VisualContext) -> Cut | None:
        return super().before_llm(ctx) if self.layer is None else None

    def at_layer(self, layer: int, ctx: VisualContext) -> Cut | None:
        """The cut that the base makes before the language model, made of what is left here."""
        return super().before_llm(ctx)
