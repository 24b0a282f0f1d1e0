# SPDX-License-Identifier: Apache-2.0
"""Llama 4: found by convention, but for queries that grow with their place in the sequence.

Layers without rotary positions scale their queries by the place that a token has among the rows at hand
(``attn_temperature_tuning``); after a cut these are other places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtoken import compat
from vtoken.adapters.generic import GenericAdapter
from vtoken.engine.cache import is_static, pruned_of

if TYPE_CHECKING:
    from vtoken.engine.hooks import AdapterHooks


class Llama4Adapter(GenericAdapter):
    """`transformers.Llama4ForConditionalGeneration`."""

    model_types = ("llama4",)
    leading_tokens = 0  # [CLS] stands behind the patches

    def install(self, hooks: AdapterHooks) -> None:
        super().install(hooks)
        for layer in self.layers:
            block = layer.self_attn
            if block.attn_temperature_tuning and not block.use_rope:
                hooks.replace(block, "forward", _refusing)
                hooks.replace(block.q_proj, "forward", _scaled(block, hooks))


def _refusing(original: Callable) -> Callable:
    block: Any = original.__self__  # type: ignore[attr-defined]

    def forward(*args: Any, **kwargs: Any) -> Any:
        cache: Any = compat.given_cache(kwargs)
        pruned = pruned_of(cache, block.layer_idx) is not None and is_static(cache)
        if pruned and cache.layers[block.layer_idx].max_cache_len >= block.floor_scale:
            raise NotImplementedError(
                f"This model scales queries from place {block.floor_scale} on by the length of the cache, and a pruned "
                "StaticCache does not know its logical length: use a dynamic cache, or a shorter static one."
            )
        return original(*args, **kwargs)

    return forward


def _scaled(block: Any, hooks: AdapterHooks) -> Callable[[Callable], Callable]:
    """Projected queries that the block will scale by their places among the rows left as if by their own places."""

    def growth(places: Tensor) -> Tensor:
        return torch.log1p(torch.floor((places.float() + 1.0) / block.floor_scale)) * block.attn_scale + 1.0

    def make(original: Callable) -> Callable:
        def project(hidden: Tensor) -> Tensor:
            queries = original(hidden)
            if (found := hooks.places()) is None:
                return queries
            places, past = found
            if places.shape[1] != queries.shape[1]:
                raise NotImplementedError(
                    f"{type(block).__name__} scales queries by their place among the rows that it is given: use a "
                    "reducer that drops tokens, and does not run layers on a part of them."
                )
            counted = torch.arange(queries.shape[1], device=queries.device) + past
            ratio = growth(places.to(queries.device)) / growth(counted)
            return queries * ratio[..., None].to(queries.dtype)

        return project

    return make
