# SPDX-License-Identifier: Apache-2.0
"""Logical versus stored length of a KV cache: the only file that knows transformers' cache and mask versions.

A pruned cache holds fewer columns than the sequence has tokens. Its layers keep reporting the *logical* length
(``get_seq_length``) and give the mask code the stored size plus an offset (``get_mask_sizes``), exactly as
transformers' own sliding-window layers do. So ``generate``'s slicing, positions, crop and multi-turn stay right, and
only 2-D masks must be realigned (`CacheState.mask2d`). Static layers count in tensors and cannot be virtual: they
stay physical.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

STATE = "_vtoken"
"""Attribute of a cache object that holds its `CacheState`: it is copied and dies with the cache."""


class _Virtual:
    vtoken_dropped = 0
    _physical = False

    def get_seq_length(self, *args: Any) -> int:
        stored = super().get_seq_length(*args)  # type: ignore[misc]
        return stored if self._physical or not stored else stored + self.vtoken_dropped

    def get_mask_sizes(self, query: Any) -> tuple[int, int]:
        if self.is_sliding:  # type: ignore[attr-defined]
            length, offset = super().get_mask_sizes(query)  # type: ignore[misc]
            return length, offset + self.vtoken_dropped
        query = query if isinstance(query, int) else query.shape[0]  # a tensor of positions before transformers 5.9
        return super().get_seq_length() + query, self.vtoken_dropped  # type: ignore[misc]

    def crop(self, length: int) -> None:
        self._physical = True
        try:  # positive: an absolute length (transformers < 5.14); negative: a number of columns to remove
            super().crop(length - self.vtoken_dropped if length > 0 else length)  # type: ignore[misc]
        finally:
            self._physical = False

    def reset(self) -> None:
        self.vtoken_dropped = 0
        super().reset()  # type: ignore[misc]


class VirtualDynamicLayer(_Virtual, DynamicLayer):
    """A dynamic layer whose logical length exceeds what it stores."""


class VirtualSlidingLayer(_Virtual, DynamicSlidingWindowLayer):
    """A sliding-window layer whose logical length exceeds what it has seen."""


_CLASSES: dict[type, type] = {DynamicLayer: VirtualDynamicLayer, DynamicSlidingWindowLayer: VirtualSlidingLayer}


def make_virtual(cache: Cache, index: int, dropped: int) -> None:
    """Tell layer ``index`` that ``dropped`` more of the logical tokens are not stored."""
    layer = cache.layers[index]
    if dropped == 0 or isinstance(layer, StaticLayer) or not hasattr(layer, "get_seq_length"):
        return
    if not isinstance(layer, _Virtual):
        kind = type(layer)
        if kind not in _CLASSES:  # offloaded, quantized, ... layers
            _CLASSES[kind] = type("Virtual" + kind.__name__, (_Virtual, kind), {})
        virtual: Any = object.__new__(_CLASSES[kind])
        virtual.__dict__.update(layer.__dict__)
        cache.layers[index] = layer = virtual
    layer.vtoken_dropped += dropped


def _anchor(cache: Cache, index: int = 0) -> int:
    """``index``, or the first layer that has a sequence length (linear-attention layers have none)."""

    def counts(i: int) -> bool:
        return i < len(cache.layers) and hasattr(cache.layers[i], "get_seq_length")

    return index if counts(index) else next(i for i in range(len(cache.layers)) if counts(i))


def stored_length(cache: Cache, index: int) -> int:
    """Columns that layer ``index`` physically holds."""
    layer: Any = cache.layers[_anchor(cache, index)]
    return int(layer.get_seq_length()) - getattr(layer, "vtoken_dropped", 0)


def logical_length(cache: Cache | None) -> int:
    """Tokens that the cache stands for; 0 without a cache."""
    return 0 if cache is None else int(cache.get_seq_length())


def is_static(cache: Cache | None) -> bool:
    """Whether the cache is preallocated (StaticCache)."""
    return bool(cache is not None and cache.layers and isinstance(cache.layers[_anchor(cache)], StaticLayer))


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that the cache holds."""
    tensors = [t for layer in cache.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


class CacheState:
    """Which stored columns of a pruned cache are real tokens, and where in the original sequence they stood.

    Parameters
    ----------
    cache : Cache
        The pruned cache; the state is stored on it.
    stored : list of Tensor
        Per layer (B, n) bool: the columns written up to the last pruned prefill that are not padding.
    places : list of Tensor
        Per layer (B, n) long: their index in the original sequence.
    shift : Tensor or None
        (B,) how much ``positions="compact"`` has lowered the position ids; None where they are the original ones.
    """

    def __init__(self, cache: Cache, stored: list[Tensor], places: list[Tensor], shift: Tensor | None) -> None:
        self.stored, self.places, self.shift = stored, places, shift
        different = {id(s): s for s in stored}  # most layers share one: one look at the device, and none in a step
        full = {key: bool(s.all()) for key, s in different.items()}
        self.full = [full[id(s)] for s in stored]
        self.same_as_first = [s is stored[0] for s in stored]  # the model builds the mask of layer 0 itself
        self.uniform = all(self.same_as_first)
        static = is_static(cache)
        self.static_length = max(getattr(layer, "max_cache_len", 0) for layer in cache.layers) if static else 0
        setattr(cache, STATE, self)

    @property
    def rows(self) -> int:
        """Batch size of the prefill."""
        return self.stored[0].shape[0]

    def mask2d(
        self, cache: Cache, index: int, query: int, mask: Tensor | None = None, window: int | None = None
    ) -> Tensor | None:
        """Validity of the columns that layer ``index`` will attend to; None if all are valid.

        Parameters
        ----------
        query : int
            Number of new tokens.
        mask : Tensor, optional
            The caller's mask over the logical sequence, (B, L).
        window : int, optional
            Hide what is further away in the *original* sequence (transformers counts stored columns).

        Returns
        -------
        Tensor or None
            (B, logical length) for virtual layers, in the coordinates of transformers' mask code;
            (B, buffer length) for static ones, a constant shape that can be compiled.
        """
        stored = self.stored[index]
        if self.static_length:
            if self.full[index]:
                return None
            return pad(stored, (0, self.static_length - stored.shape[1]), value=True)
        have = stored_length(cache, index)
        stored = stored[:, :have]  # a crop() may have removed the newest columns
        tail = have + query - stored.shape[1]
        junk = getattr(cache.layers[_anchor(cache, index)], "vtoken_dropped", 0)
        if mask is not None:
            valid = torch.cat([stored, mask[:, mask.shape[1] - tail :].to(stored)], 1)
        elif self.full[index] and not window:
            return None
        else:
            valid = torch.cat([stored, stored.new_ones(stored.shape[0], tail)], 1)
        if window:
            now = have + junk  # index of the single query
            valid[:, : stored.shape[1]] &= self.places[index][:, :have] > now - window
        return pad(valid, (junk, 0)) if junk else valid

    def step_mask(self, cache: Cache, index: int, given: Tensor) -> Tensor:
        """The prepared mask of layer ``index`` for one new token, from the one of another full-attention layer.

        Both stored the tokens since the pruned prefill. So nothing is asked of transformers' mask code, which would
        wait for the device to see whether all columns are valid.

        Parameters
        ----------
        given : Tensor
            (B, 1, 1, columns of the other layer), boolean or additive, or (B, columns) for flash attention.
        """
        stored = self.stored[index][:, : stored_length(cache, index)]
        tail = stored_length(cache, index) + 1 - stored.shape[1]
        seen = (stored if given.dim() == 2 else stored[:, None, None]).expand(*given.shape[:-1], -1)
        known = seen.to(given.dtype)
        if given.is_floating_point():
            known = torch.zeros_like(known).masked_fill(~seen, torch.finfo(given.dtype).min)
        return torch.cat([known, given[..., given.shape[-1] - tail :]], -1)


def state_of(cache: Cache | None) -> CacheState | None:
    """The state that a pruned prefill left on the cache."""
    return getattr(cache, STATE, None)


def one_layer(cache: Cache | None, index: int) -> Cache | None:
    """A cache of layer ``index`` alone: makes transformers size a mask for that layer, in every version."""
    return Cache(layers=[cache.layers[index]]) if cache is not None and index < len(cache.layers) else None


def make_mask(make: Any, config: Any, embeds: Tensor, mask: Tensor | None, cache: Cache | None) -> Any:
    """Call ``create_causal_mask`` or a sibling; ``cache_position`` was an argument before transformers 5.10."""
    kwargs: dict[str, Any] = {"inputs_embeds": embeds}
    if "cache_position" in inspect.signature(make).parameters:
        past = cache.get_seq_length() if cache is not None else 0
        kwargs["cache_position"] = torch.arange(embeds.shape[1], device=embeds.device) + past
    return make(config=config, attention_mask=mask, past_key_values=cache, **kwargs)
