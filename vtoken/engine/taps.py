# SPDX-License-Identifier: Apache-2.0
"""Looks at the queries and keys of one attention module under any backend, or takes the backend's place.

Every attention class of transformers dispatches on ``self.config._attn_implementation`` and calls
``fn(module, query, key, value, mask, scaling=..., ...)`` with rotated, normalised, cache-updated queries and keys. A
tapped module gets a config proxy that names the function registered here, which looks at queries and keys and then
calls the real backend. So SDPA and FlashAttention stay on, and rope, q-norm, fused projections and grouped heads need
no knowledge. Masks are built from the model's own config and are not affected. This file must not know what is read.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BACKEND = "vtoken_tap"

Reader = Callable[[nn.Module, Tensor, Tensor, "Tensor | None", dict[str, Any]], None]
"""``reader(module, query (B, H, Q, d), key (B, G, K, d), mask, kwargs)``; ``kwargs["value"]`` is (B, G, K, d)."""
Attend = Callable[[nn.Module, Tensor, Tensor, Tensor, "Tensor | None", dict[str, Any]], Tensor]
"""``attend(module, query, key, value, mask, kwargs)`` gives the output (B, Q, H, d) that the backend would."""
_PARTS = "_vtoken_parts"


class _ConfigProxy:
    def __init__(self, real: Any) -> None:
        object.__setattr__(self, "real", real)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "real"), name)

    @property
    def _attn_implementation(self) -> str:
        return BACKEND


class SeenEnoughError(Exception):
    """Raised by the reader of `stopped_at` to skip the attention itself."""


def _tapped(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask=None, *args, **kwargs):
    proxy: Any = module.config
    real = proxy.real
    implementation = real._attn_implementation
    parts = vars(module)[_PARTS]
    if (reader := parts.get("reader")) is not None:
        reader(module, query, key, attention_mask, {**kwargs, "value": value})
    if (attend := parts.get("attend")) is not None:
        return attend(module, query, key, value, attention_mask, kwargs), None
    if implementation in (None, "eager"):
        backend = sys.modules[type(module).__module__].eager_attention_forward
    else:
        backend = ALL_ATTENTION_FUNCTIONS[implementation]
    module.config = real  # flash attention reads module.config
    try:
        return backend(module, query, key, value, attention_mask, *args, **kwargs)
    finally:
        module.config = proxy


AttentionInterface.register(BACKEND, _tapped)


def tap(module: nn.Module, reader: Reader) -> contextlib.AbstractContextManager[None]:
    """While open, ``reader`` sees queries and keys of every call of this attention module."""
    return _intercepted(module, reader=reader)


def replaced(module: nn.Module, attend: Attend) -> contextlib.AbstractContextManager[None]:
    """While open, ``attend`` takes the place of the attention backend of this module."""
    return _intercepted(module, attend=attend)


def untapped(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """While open, no reader sees the calls of this attention module, and its own backend serves them."""
    return _intercepted(module, reader=None, attend=None)


@contextlib.contextmanager
def _intercepted(module: nn.Module, **parts: Any) -> Iterator[None]:
    config, outer = module.config, vars(module).get(_PARTS)
    setattr(module, _PARTS, {**(outer or {}), **parts})
    module.config = _ConfigProxy(config.real if outer is not None else config)  # type: ignore[assignment]
    try:
        yield
    finally:
        module.config = config
        if outer is not None:  # a peek inside of a tap
            setattr(module, _PARTS, outer)
        else:
            delattr(module, _PARTS)


@contextlib.contextmanager
def tap_fused(module: nn.Module, reader: Reader) -> Iterator[None]:
    """`tap` for code outside of transformers that does not dispatch: reads the output of a fused ``qkv`` projection."""

    def read(_: nn.Module, __: tuple, output: Tensor) -> None:
        heads = int(module.num_heads)  # type: ignore[arg-type]
        query, key, _values = output.unflatten(-1, (3, -1)).unbind(-2)
        if getattr(module, "qk_normalization", False):
            query, key = module.q_norm(query), module.k_norm(key)  # type: ignore[operator]
        query, key = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))
        reader(module, query, key, None, {"scaling": getattr(module, "scale", None)})

    handle = module.qkv.register_forward_hook(read)  # type: ignore[union-attr]
    try:
        yield
    finally:
        handle.remove()
