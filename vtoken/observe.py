# SPDX-License-Identifier: Apache-2.0
"""A reducer that reduces nothing: it shows what reducers see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vtoken.context import Cut, VisualContext
from vtoken.reducers.base import Reducer


@dataclass(frozen=True)
class Observe(Reducer):
    """Calls a function with the context and keeps every token.

    Parameters
    ----------
    see : callable
        ``see(ctx)``; ``ctx.layer`` is -1 before the language model.
    at : tuple of int
        Decoder layers before which it is called; only before the language model if empty.
    """

    name = "observe"
    summary = "Keeps every token and looks at the context."

    see: Callable[[VisualContext], None]
    at: tuple[int, ...] = ()

    def before_llm(self, ctx: VisualContext) -> Cut | None:
        if not self.at:
            self.see(ctx)
        return None

    def layers(self, depth: int) -> tuple[int, ...]:
        return self.at

    def at_layer(self, layer: int, ctx: VisualContext) -> Cut | None:
        self.see(ctx)
        return None
