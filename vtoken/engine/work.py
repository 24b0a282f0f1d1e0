# SPDX-License-Identifier: Apache-2.0
"""What a reducer is going to do in one model, found out and checked when it is wrapped.

This file must not know any forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vtoken.adapters.base import BETWEEN, HIDING, KEPT_POSITIONS, READING
from vtoken.engine.masks import FULL, WINDOWS, layer_type
from vtoken.engine.repair import check_backend, frequencies
from vtoken.light import LightLayer

if TYPE_CHECKING:
    from vtoken.adapters.base import Adapter
    from vtoken.reducers.base import Reducer


@dataclass(frozen=True)
class Work:
    """The layers at which a reducer acts.

    Parameters
    ----------
    idle : bool
        Whether it leaves the model alone (``keep=1.0``).
    depth : int
        Decoder layers.
    kinds : tuple of str
        Kind of each layer, see `vtoken.engine.masks.layer_type`.
    layers : frozenset of int
        Layers before which it is asked; ``depth`` stands for behind the last one.
    taps : mapping of int to str
        Layers whose attention rows it reads.
    light : mapping of int to LightLayer
        Layers that it makes light.
    reads_question : bool
        Whether what it chooses before or inside of the decoder depends on the text.
    """

    idle: bool
    depth: int
    kinds: tuple[str, ...]
    layers: frozenset[int]
    taps: Mapping[int, str]
    light: Mapping[int, LightLayer]
    reads_question: bool

    @classmethod
    def of(cls, adapter: Adapter, reducer: Reducer, backend: str) -> Work:
        """Ask a reducer what it will do in a model.

        Raises
        ------
        ValueError
            If it names a layer that does not exist.
        NotImplementedError
            If it reads the attention of a recurrent layer, or tokens would be hidden from recurrent layers.
        """
        depth = len(adapter.layers)
        kinds = tuple(layer_type(adapter, layer) for layer in range(depth))
        if backend == "mask" and any("linear" in kind for kind in kinds):
            raise NotImplementedError(
                "backend='mask' is not defined for a decoder with recurrent layers, which see a hidden token all the "
                "same: use backend='drop'."
            )
        if reducer.is_identity:
            return cls(True, depth, kinds, frozenset(), {}, {}, False)
        layers, taps = frozenset(reducer.layers(depth)), reducer.taps(depth)
        light = reducer.light_layers(depth)
        for layer in {*layers - {depth}, *taps, *light}:
            if not 0 <= layer < depth:
                raise ValueError(f"Reducer {reducer.name!r} wants layer {layer}, but the decoder has {depth} layers.")
        sources = [adapter.kv_source(layer) for layer in range(depth)]
        last = min((source for layer, source in enumerate(sources) if source != layer), default=depth)
        if (late := max(layers - {depth}, default=0)) > last:
            raise NotImplementedError(
                f"Reducer {reducer.name!r} drops tokens before layer {late}, but later layers reuse the keys that "
                f"layer {last} made or chose, with them: drop before layer {last} at the latest, or before the decoder."
            )
        peeks = reducer.peeks(depth)
        for layer in (*taps, *peeks):
            if not adapter.has_attention(adapter.layers[layer]):
                attend = [str(i) for i in range(depth) if adapter.has_attention(adapter.layers[i])]
                raise NotImplementedError(
                    f"Reducer {reducer.name!r} reads the attention of decoder layer {layer}, which is recurrent: "
                    f"choose a layer that attends ({', '.join(attend)}), or a reducer that reads no attention."
                )
        if peeks:
            _ = adapter.attention_norm  # raises where attention that is yet to come cannot be read
        return cls(False, depth, kinds, layers, taps, light, reducer.uses_text or bool(taps))

    @property
    def slides(self) -> bool:
        """Whether any layer attends in windows."""
        return any(kind in WINDOWS for kind in self.kinds)

    def check_limits(self, adapter: Adapter, reducer: Reducer, positions: str, backend: str) -> None:
        """Refuse what a family cannot do by half.

        Raises
        ------
        NotImplementedError
            One sentence with the reason that the family gives.
        """
        limits, name = adapter.limits, type(adapter.model).__name__
        if self.idle:
            return
        if reducer.repair is not False:
            self._check_repair(adapter, reducer)
        if backend == "mask" and HIDING in limits:
            raise NotImplementedError(f"{name} {limits[HIDING]}: use backend='drop'.")
        if positions == "keep" and KEPT_POSITIONS in limits:
            raise NotImplementedError(f"{name} {limits[KEPT_POSITIONS]}: pass positions='compact'.")
        if BETWEEN in limits and (self.layers - {self.depth} or self.light):
            raise NotImplementedError(
                f"{name} {limits[BETWEEN]}, so that {reducer.name!r} cannot act between its layers: use a reducer that "
                "drops tokens before the decoder."
            )
        if READING in limits and self.taps:
            raise NotImplementedError(
                f"{name} {limits[READING]}, so that {reducer.name!r} cannot read it: use a reducer that reads no "
                "decoder attention."
            )

    def _check_repair(self, adapter: Adapter, reducer: Reducer) -> None:
        """Refuse what `vtoken.engine.repair` cannot do, or what leaves it nothing to do."""
        if reducer.repair is not True:
            raise ValueError(f"repair={reducer.repair!r} of reducer {reducer.name!r} is neither True nor False.")
        name, limits = type(adapter.model).__name__, adapter.limits
        if reducer.cutter is not None or self.light or not {"before_llm", "in_llm"} & {*reducer.stages}:
            raise NotImplementedError(
                f"repair=True counts tokens that go before or inside of the decoder for those that stay, and "
                f"{reducer.name!r} works otherwise: leave repair out, or use a reducer that only drops or merges there."
            )
        if BETWEEN in limits:
            raise NotImplementedError(f"{name} {limits[BETWEEN]}, which repair=True needs: leave repair out.")
        for kind in dict.fromkeys(self.kinds):
            if kind in (FULL, *WINDOWS):
                frequencies(adapter, kind)
            elif "linear" not in kind:
                raise NotImplementedError(
                    f"{name} has layers of the kind {kind!r}, whose masks hold no logits: leave repair out."
                )
        check_backend(adapter)
