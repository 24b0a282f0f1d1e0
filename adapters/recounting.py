# SPDX-License-Identifier: Apache-2.0
"""Decoders that count by the rows that are there: what is left of a prompt after a drop is to them a shorter prompt.

Inkling's layers take distances between tokens, and their convolutions the token before, from rows. The indexers of
MiniMax M3 and GLM-5 Next choose neighbouring rows together. So a dropped token is not the same as a hidden one, and
positions are counted anew. In all of them a cut between layers would give later layers another count than earlier ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from vtoken import compat
from vtoken.adapters.base import BETWEEN, HIDING, KEPT_POSITIONS, READING
from vtoken.adapters.generic import GenericAdapter
from vtoken.engine.cache import pruned_of

if TYPE_CHECKING:
    from vtoken.engine.hooks import AdapterHooks

ROWS = "counts distances between tokens by the rows that are there, as if the prompt were a shorter one"
BLOCKS = "chooses keys in blocks of neighbouring rows, as if the prompt were a shorter one"


class InklingAdapter(GenericAdapter):
    """`transformers.InklingForConditionalGeneration` and `Inkling2ForConditionalGeneration`."""

    model_types = ("inkling_mm_model", "inkling2")
    answers = frozenset({"distances", "kinds"})
    recounts = True
    kind_names: ClassVar[Mapping[str, str]] = {"hybrid": "full_attention", "hybrid_sliding": "sliding_attention"}
    limits: ClassVar[Mapping[str, str]] = {
        BETWEEN: f"{ROWS}, and adds to later layers what earlier ones made of the same rows",
        KEPT_POSITIONS: ROWS,
        HIDING: ROWS,
        READING: "adds to its attention what depends on distances between rows",
    }

    def install(self, hooks: AdapterHooks) -> None:
        super().install(hooks)
        for layer in self.layers:
            hooks.replace(layer.self_attn, "forward", _counting_rows(layer.self_attn.layer_idx))


class MiniMaxM3Adapter(GenericAdapter):
    """`transformers.MiniMaxM3SparseForConditionalGeneration`: blocks of keys are found by position ids."""

    model_types = ("minimax_m3_vl",)
    answers = frozenset({"blocks", "kinds"})
    recounts = True
    limits: ClassVar[Mapping[str, str]] = {
        BETWEEN: f"{BLOCKS}, and finds them by position ids in which a cut between layers would leave gaps",
        KEPT_POSITIONS: f"{BLOCKS}, and finds them by position ids, which must have no gaps",
        HIDING: BLOCKS,
        READING: "attends to chosen blocks under the backends that it knows by name only",
    }


class Glm5NextAdapter(GenericAdapter):
    """`transformers.Glm5NextForConditionalGeneration`: knows no positions, and masks by its indexer alone."""

    model_types = ("glm5_next",)
    answers = frozenset({"blocks"})
    recounts = True
    limits: ClassVar[Mapping[str, str]] = {
        BETWEEN: f"{BLOCKS}, hands the choice on to later layers, and takes no mask that differs by layer",
        HIDING: BLOCKS,
    }

    def install(self, hooks: AdapterHooks) -> None:
        super().install(hooks)
        for layer in self.layers:
            if (indexer := getattr(layer.self_attn, "indexer", None)) is not None:
                hooks.replace(indexer, "forward", _counting_rows(indexer.layer_idx))


def _counting_rows(layer: int) -> Callable[[Callable], Callable]:
    """A method that is given a pruned cache as one that is as long as what it stores."""

    def make(original: Callable) -> Callable:
        names = list(inspect.signature(original).parameters)

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = {**dict(zip(names, args, strict=False)), **kwargs}
            call = compat.ours(call)
            cache = call.get(compat.CACHE)
            pruned = None if cache is None else pruned_of(cache, layer)
            if pruned is not None and pruned.buffer is None:  # static layers count what they store
                call[compat.CACHE] = _Stored(cache, layer)
            return original(**compat.in_words_of(original, call))

        return forward

    return make


class _Stored:
    """A pruned cache in which one layer reports what it stores, not what it stands for."""

    def __init__(self, cache: Any, layer: int) -> None:
        self.cache, self.layer, self.dropped = cache, layer, cache.layers[layer].pruned.dropped

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    @property
    def layers(self) -> dict[int, Any]:
        """The layer alone."""
        return {self.layer: _StoredLayer(self.cache.layers[self.layer], self.dropped)}

    def get_mask_sizes(self, query: int, layer: int) -> tuple[int, int]:
        """Length and offset of the keys."""
        length, offset = self.cache.get_mask_sizes(query, layer)
        return length, offset - self.dropped

    def get_query_offset(self, layer: int) -> int:
        """Number of the first new row."""
        offset: int = self.cache.get_query_offset(layer)
        return offset - self.dropped


class _StoredLayer:
    """A layer of such a cache."""

    def __init__(self, layer: Any, dropped: int) -> None:
        self.layer, self.dropped = layer, dropped

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def get_seq_length(self) -> int:
        """Rows that are stored."""
        length: int = self.layer.get_seq_length()
        return length - self.dropped
