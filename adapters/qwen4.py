# SPDX-License-Identifier: Apache-2.0
"""Qwen4-Exp: layers with an indexer need the positions of all their keys, which a cut makes different by layer.

The indexer counts blocks of neighbours over the keys that a query sees, so that a dropped token and a hidden one mean
the same to it. Transformers keeps the positions of the keys on the first such layer of the cache; here each layer
keeps those of the keys that it holds, in the same place, so that the cache takes care of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtoken import compat
from vtoken.adapters.generic import GenericAdapter
from vtoken.ops.ragged import gather

if TYPE_CHECKING:
    from vtoken.engine.hooks import AdapterHooks


class Qwen4Adapter(GenericAdapter):
    """`transformers.Qwen4ExpForConditionalGeneration`."""

    model_types = ("qwen4_exp",)
    answers = frozenset({"blocks"})

    def install(self, hooks: AdapterHooks) -> None:
        super().install(hooks)
        attending = [layer for layer in self.layers if self.has_attention(layer)]
        if not attending:
            return
        positions = _Positions(self.language_model.rotary_emb.forward, hooks)
        hooks.replace(self.language_model.rotary_emb, "forward", positions.noted)
        for layer in attending:
            hooks.replace(layer.self_attn, "forward", positions.own(layer is attending[0]))


class _Positions:
    """Rotary tables of the keys that each layer holds."""

    def __init__(self, tables: Callable, hooks: AdapterHooks) -> None:
        self.tables, self.hooks = tables, hooks
        self.new: Any = None  # (3, B, S): set anew by every call of the language model, before its layers ask

    def noted(self, original: Callable) -> Callable:
        """Remembers the positions of the new tokens of a call."""

        def forward(hidden: Tensor, position_ids: Tensor) -> Any:
            self.new = position_ids[..., -hidden.shape[1] :]
            return original(hidden, position_ids)

        return forward

    def own(self, first: bool) -> Callable[[Callable], Callable]:
        """An attention that is given the tables of its own keys; to the ``first`` the new ones were added already."""

        def make(original: Callable) -> Callable:
            layer = original.__self__.layer_idx  # type: ignore[attr-defined]

            def forward(hidden: Tensor, tables: Any, *args: Any, **kwargs: Any) -> Any:
                cache: Any = compat.given_cache(kwargs)
                if cache is None:
                    return original(hidden, tables, *args, **kwargs)
                left, held, new = self.hooks.rows(), cache.layers[layer], self.new
                before = held.indexer_position_ids
                if first and before is not None:
                    before = before[..., : -new.shape[-1]]
                if left is not None:
                    new = gather(new, left[0], dim=2, batch=1)
                known = new if before is None else torch.cat([before, new.to(before.device)], -1)
                held.indexer_position_ids = known
                if known.shape[-1] != tables[0].shape[1] or left is not None:
                    tables = self.tables(hidden, known)
                return original(hidden, tables, *args, **kwargs)

            return forward

        return make
