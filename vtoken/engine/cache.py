# SPDX-License-Identifier: Apache-2.0
"""Logical versus stored length of a KV cache, and all that a user may do to a cache object.

A pruned cache holds fewer columns than the sequence has tokens. Its layers keep reporting the *logical* length
(``get_seq_length``) and give the mask code the stored size plus an offset (``get_mask_sizes``), exactly as
transformers' own sliding-window layers do. So ``generate``'s slicing, positions and multi-turn stay right.

What a layer remembers of its pruning (`Pruned`) lives in that layer and nowhere else: whatever is done to a layer
(crop, reset, reorder, repeat, select, copy, save) is done to it too, and it dies with the layer. A layer becomes a
pruned one by changing its class, so that its identity, on which compiled graphs are guarded, stays; ``reset`` changes
it back. Static layers count in tensors and cannot be virtual: they stay physical.

It must not know masks, models or reducers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer

from vtoken.compat import CROPS_TO_A_LENGTH
from vtoken.ops.ragged import compact, gather


@dataclass(frozen=True, eq=False)
class Pruned:
    """What one cache layer remembers of the pruned prefills that wrote its first n columns.

    Parameters
    ----------
    valid : Tensor
        (B, n) bool: columns that are neither padding nor hidden.
    place : Tensor
        (B, n) long: their index in the original sequence.
    shift : Tensor or None
        (B,) how much ``positions="compact"`` has lowered the position ids; None where they are the original ones.
    group : tuple of int
        Names the set of columns: layers of one cache with the same name hold the same columns.
    full : bool
        Whether all columns are valid, so that no mask is needed.
    uniform : bool
        Whether all layers hold the same columns.
    alone : bool
        Whether a stock model, too, would continue right on it: every layer holds the same valid columns, under their
        original position ids.
    dropped : int
        Tokens of the sequence that the layer does not hold (dynamic layers).
    buffer : Tensor or None
        Static layers: ``valid`` over the whole buffer, a shape that stays from prompt to prompt.
    worth : Tensor or None
        (B, n) float: what attention adds to the logits of each column, where pruning is repaired; over the whole buffer
        in static layers.
    """

    valid: Tensor
    place: Tensor
    shift: Tensor | None
    group: tuple[int, ...]
    full: bool
    uniform: bool = False
    alone: bool = False
    dropped: int = 0
    buffer: Tensor | None = None
    worth: Tensor | None = None

    def rows(self, take: Callable[[Tensor], Tensor]) -> Pruned:
        """The same with its batch rows taken by ``take``."""
        shift, buffer, worth = (None if x is None else take(x) for x in (self.shift, self.buffer, self.worth))
        return replace(self, valid=take(self.valid), place=take(self.place), shift=shift, buffer=buffer, worth=worth)


class _PrunedLayer(CacheLayerMixin):
    """What every pruned layer does beside its stock class, which comes behind it in the order of bases.

    It has the base of all layers, without which Python lets no layer change its class.
    """

    stock: type
    pruned: Pruned
    served = False
    """Whether a wrapped model is at work on the cache now, whose hooks give each layer the mask it needs."""

    def get_mask_sizes(self, query: Any) -> tuple[int, int]:
        if not self.served and not self.pruned.alone:
            raise RuntimeError(
                "This cache was pruned by vtoken and needs a wrapped model, which knows what each of its layers holds: "
                "continue on a wrapped model, or start with a new cache."
            )
        return super().get_mask_sizes(query)  # type: ignore[safe-super]

    def reset(self) -> None:
        self.__class__ = self.stock  # what was stored is gone, and with it all that was to remember
        for name in ("pruned", "served"):
            vars(self).pop(name, None)
        self.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._take_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._take_rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._take_rows(lambda x: x[indices])

    def _take_rows(self, take: Callable[[Tensor], Tensor]) -> None:
        self.pruned = self.pruned.rows(take)  # after the keys and values: if these fail, the layer is as it was

    def __reduce__(self) -> tuple:
        state = {name: value for name, value in vars(self).items() if name != "served"}  # a copy is at work nowhere
        return _rebuilt, (self.stock, state)


class _PhysicalLayer(_PrunedLayer):
    """A static layer, which counts what it stores."""

    def crop(self, amount: int) -> None:
        """Remove the newest tokens; which columns hold those of the prompt's end, the layer does not know."""
        left = int(self.get_seq_length()) - abs(amount)
        if left < self.pruned.valid.shape[1]:
            raise NotImplementedError(
                f"A pruned {self.stock.__name__} cannot be cropped into its prompt, of which it does not hold all: "
                "crop less, or use a dynamic cache."
            )
        super().crop(amount)  # type: ignore[misc]


class _VirtualLayer(_PrunedLayer):
    """A dynamic layer whose logical length exceeds what it stores."""

    is_sliding: bool
    _cropping = False

    def get_seq_length(self, *args: Any) -> int:
        stored = super().get_seq_length(*args)  # type: ignore[safe-super]
        return stored if self._cropping else stored + self.pruned.dropped

    def get_mask_sizes(self, query: Any) -> tuple[int, int]:
        length, offset = super().get_mask_sizes(query)
        if self.is_sliding:  # counts what it has seen
            return length, offset + self.pruned.dropped
        return length - self.pruned.dropped, self.pruned.dropped

    def crop(self, amount: int) -> None:
        """Remove the newest tokens of the logical sequence, see `CROPS_TO_A_LENGTH`."""
        logical = self.get_seq_length()
        if amount > 0 and not CROPS_TO_A_LENGTH:
            super().crop(amount)  # type: ignore[misc]  # raises the stock error
        absolute = amount > 0 or (amount == 0 and CROPS_TO_A_LENGTH)
        length = amount if absolute else max(logical + amount, 0)
        gone = max(logical - length, 0)
        if gone > self._stored() - self.pruned.valid.shape[1]:
            return self._crop_prompt(length)
        self._cropping = True  # to the stock method the layer is as long as what it stores
        try:
            super().crop(-gone)  # type: ignore[misc]
        finally:
            del self._cropping

    def _crop_prompt(self, length: int) -> None:
        """Keep what stands before ``length`` in the original sequence; rows may keep different numbers."""
        keys: Any = self.keys
        if not isinstance(keys, Tensor) or keys.dim() != 4 or keys.shape[2] != self._stored():
            raise NotImplementedError(
                f"A pruned {self.stock.__name__} cannot be cropped into its prompt, as it no longer holds all of it in "
                "one piece: crop less, or start with a new cache."
            )
        index, valid = compact(self.pruned.valid & (self.pruned.place < length))
        values: Any = self.values
        self.keys, self.values = (gather(x, index, dim=2) for x in (keys, values))
        if hasattr(self, "cumulative_length"):
            self.cumulative_length = index.shape[1]
        full = bool(valid.all())
        self.pruned = replace(  # last: from here on the layer is the cropped one
            self.pruned,
            valid=valid,
            place=gather(self.pruned.place, index),
            worth=None if self.pruned.worth is None else gather(self.pruned.worth, index),
            full=full,
            alone=self.pruned.alone and full,
            dropped=length - index.shape[1],
        )

    def _stored(self) -> int:
        return int(self.get_seq_length()) - self.pruned.dropped


_CLASSES: dict[type, type] = {}


def _pruned_class(stock: type) -> type:
    """The pruned kind of a layer class; offloaded, quantized and other layers get theirs when they are met."""
    if stock not in _CLASSES:
        mixin = _PhysicalLayer if issubclass(stock, StaticLayer) else _VirtualLayer
        # transformers enters subclasses that name a layer type into its table of layers: this one must not
        _CLASSES[stock] = type("Pruned" + stock.__name__, (mixin, stock), {"stock": stock, "_layer_type": None})
    return _CLASSES[stock]


def _rebuilt(stock: type, state: dict[str, Any]) -> Any:
    """A pruned layer from what was copied or saved of it."""
    layer: Any = object.__new__(_pruned_class(stock))
    vars(layer).update(state)
    return layer


def remember(cache: Cache, index: int, pruned: Pruned) -> None:
    """Make layer ``index`` a pruned one that remembers ``pruned``."""
    layer: Any = cache.layers[index]
    if isinstance(layer, StaticLayer):
        free = layer.max_cache_len - pruned.valid.shape[1]
        worth = None if pruned.worth is None else pad(pruned.worth, (0, free))
        pruned = replace(pruned, alone=False, buffer=pad(pruned.valid, (0, free), value=True), worth=worth)
    if not isinstance(layer, _PrunedLayer):
        layer.__class__ = _pruned_class(type(layer))
    layer.pruned = pruned


def pruned_of(cache: Cache | None, index: int | None = None) -> Pruned | None:
    """What layer ``index`` remembers; by default the first layer that has columns. None where nothing was pruned."""
    if cache is None or not getattr(cache, "layers", None):
        return None
    found = _anchor(cache, 0) if index is None else index
    return None if found is None else getattr(cache.layers[found], "pruned", None)


def serve(cache: Cache | None, served: bool) -> None:
    """Say whether a wrapped model is at work on a pruned cache, see `_PrunedLayer.served`."""
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, _PrunedLayer):
            layer.served = served


def _anchor(cache: Cache, index: int) -> int | None:
    """``index``, or the first layer that has a sequence length (linear-attention layers have none)."""

    def counts(i: int) -> bool:
        return i < len(cache.layers) and hasattr(cache.layers[i], "get_seq_length")

    return index if counts(index) else next((i for i in range(len(cache.layers)) if counts(i)), None)


def stored_length(cache: Cache, index: int) -> int:
    """Columns that layer ``index`` physically holds."""
    anchor = _anchor(cache, index)
    if anchor is None:
        return 0
    layer: Any = cache.layers[anchor]
    dropped = layer.pruned.dropped if isinstance(layer, _VirtualLayer) else 0
    return int(layer.get_seq_length()) - dropped


def logical_length(cache: Cache | None) -> int:
    """Tokens that the cache stands for; 0 without a cache."""
    return 0 if cache is None else int(cache.get_seq_length())


def is_static(cache: Cache | None) -> bool:
    """Whether the cache is preallocated (StaticCache)."""
    if cache is None or not getattr(cache, "layers", None):
        return False
    anchor = _anchor(cache, 0)
    return anchor is not None and isinstance(cache.layers[anchor], StaticLayer)


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that the cache holds."""
    tensors = [t for layer in cache.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def one_layer(cache: Cache | None, index: int) -> Cache | None:
    """A cache of layer ``index`` alone: makes transformers size a mask for that layer, in every version."""
    return Cache(layers=[cache.layers[index]]) if cache is not None and index < len(cache.layers) else None
