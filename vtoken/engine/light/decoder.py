# SPDX-License-Identifier: Apache-2.0
"""Makes decoder layers light: hooks on their feed-forward networks and projections, and on their attention."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vtoken.engine.light.attention import LightAttention
from vtoken.engine.light.rows import OnlyRows
from vtoken.engine.taps import replaced
from vtoken.light import LightLayer

if TYPE_CHECKING:
    from vtoken.adapters.base import Adapter
    from vtoken.engine.prefill import Prefill


class LightDecoder:
    """The light layers of one model.

    Parameters
    ----------
    adapter : Adapter
        Where things are in the model.
    layers : mapping of int to LightLayer
        By number.
    taps : mapping of int to str
        Layers whose attention rows the reducer reads, see `Reducer.taps`.

    Raises
    ------
    NotImplementedError
        If the model has no feed-forward network or attention of the kind that a layer asks for.
    ValueError
        If a layer names other heads than the model has, or attention rows are read that visual rows do not compute.
    """

    def __init__(self, adapter: Adapter, layers: Mapping[int, LightLayer], taps: Mapping[int, str]) -> None:
        self.adapter, self.layers = adapter, dict(layers)
        for number, light in self.layers.items():
            if light.ffn < 1:
                self._check_ffn(number, light)
            if light.changes_attention:
                self._check_attention(number, light, taps.get(number))

    def _check_ffn(self, number: int, light: LightLayer) -> None:
        layer = self.adapter.layers[number]
        self.adapter.ffn(layer)
        if light.ffn > 0:
            self.adapter.narrow_ffn(layer, light.ffn)

    def _check_attention(self, number: int, light: LightLayer, tap: str | None) -> None:
        layer = self.adapter.layers[number]
        if not self.adapter.has_attention(layer):
            raise NotImplementedError(
                f"Decoder layer {number} of {type(self.adapter.language_model).__name__} is recurrent: its visual rows "
                "cannot skip it. Use a reducer that leaves it alone, such as ima with skip='ffn'."
            )
        heads = self.adapter.language_model.config.num_attention_heads
        if light.heads is not None and len(light.heads) != heads:
            raise ValueError(
                f"Layer {number} is told which of {len(light.heads)} heads are active, but the model has {heads}: "
                "calibrate on this model."
            )
        if tap == "all":
            raise ValueError(
                f"The attention rows of visual tokens are read in layer {number}, where they are not computed in "
                "full: let the two reducers act at different layers."
            )

    def attach(self, running: Callable[[], Prefill | None]) -> list[Any]:
        """Install the hooks on row-wise modules, which act while ``running()`` gives a prefill; returns handles."""

        def text() -> Tensor | None:
            prefill = running()
            return None if prefill is None or prefill.is_aside else prefill.group.text

        handles: list[Any] = []
        for number, light in self.layers.items():
            layer = self.adapter.layers[number]
            if light.ffn < 1:
                narrow = functools.partial(self.adapter.narrow_ffn, layer, light.ffn) if light.ffn else None
                handles += OnlyRows(text, narrow).attach(self.adapter.ffn(layer))
            if not light.attention:
                for projection in self.adapter.query_projections(layer):
                    handles += OnlyRows(text).attach(projection)
        return handles

    def open(self, taps: contextlib.ExitStack, prefill: Prefill) -> None:
        """Take the place of the attention backend until ``taps`` are closed."""
        plans: dict[Any, Any] = {}
        for number, light in self.layers.items():
            layer = self.adapter.layers[number]
            if layer.training and getattr(layer, "gradient_checkpointing", False):
                raise NotImplementedError(
                    "Light layers are not defined under gradient checkpointing, which computes them a second time: "
                    "turn it off, or use a reducer that drops tokens."
                )
            if light.changes_attention:
                attend = LightAttention(number, light, prefill, plans)
                taps.enter_context(replaced(self.adapter.attention(layer), attend))
