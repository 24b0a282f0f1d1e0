# SPDX-License-Identifier: Apache-2.0
"""IMA: visual tokens stand still in some decoder layers."""

from __future__ import annotations

from dataclasses import dataclass

from vtoken.light import LightLayer
from vtoken.reducers.base import Reducer
from vtoken.reducers.checks import check_choice, check_count, check_place, layer_at
from vtoken.registry import register

SKIPS = {
    "ffn": LightLayer(ffn=0.0),
    "attention": LightLayer(attention=False),
    "block": LightLayer(attention=False, ffn=0.0),
}


@register("ima")
@dataclass(frozen=True)
class IMA(Reducer):
    """Implicit multimodal alignment (arXiv 2405.16700, 2410.09454): visual tokens change slowly, so skip their updates.

    In layer ``l`` with ``start < l < end`` and ``l % every == 0`` visual rows skip the feed-forward network, their own
    attention, or both. Text rows compute everything, and read the visual tokens in all layers. No token is dropped.

    The authors' code skips all rows of a call, text too, and reuses the keys and values of the layer before; here
    only visual rows skip, and each layer projects their keys and values itself.

    Parameters
    ----------
    skip : str
        ``"ffn"``, ``"attention"`` or ``"block"``.
    every : int
        Interval of the layers that skip.
    start, end : int or float
        Layers between which they lie, both excluded; numbers or shares of the depth. No ``end``: the depth.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """

    summary = "Visual tokens skip the feed-forward network (or attention, or both) of every n-th layer."
    paper = "2405.16700"

    skip: str = "ffn"
    every: int = 2
    start: int | float = 0
    end: int | float | None = None

    def __post_init__(self) -> None:
        check_choice("skip", self.skip, SKIPS)
        check_count("every", self.every)
        check_place("start", self.start)
        if self.end is not None:
            check_place("end", self.end, least=1)

    def light_layers(self, depth: int) -> dict[int, LightLayer]:
        """Every n-th layer between start and end."""
        end = depth if self.end is None else min(depth, layer_at(self.end, depth))
        between = range(layer_at(self.start, depth) + 1, end)
        return {layer: SKIPS[self.skip] for layer in between if layer % self.every == 0}
