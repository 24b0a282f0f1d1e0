# SPDX-License-Identifier: Apache-2.0
"""What a pruned prefill hands back: states at full length, router logits of real rows, and what the cache holds.

This file must not know hooks or masks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtoken import compat
from vtoken.engine import cache as kv
from vtoken.engine import repair
from vtoken.engine.positions import shift_of
from vtoken.ops.ragged import restore

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from vtoken.engine.group import Group
    from vtoken.engine.prefill import Prefill


def finish(prefill: Prefill, output: Any) -> Any:
    """Restore the outward shapes of the language model's output and tell the cache what it holds."""
    cache = compat.cache_of(output)
    if cache is not None and (prefill.shortened or prefill.hide or kv.pruned_of(cache) is not None):
        remember(prefill, cache)
    if prefill.shortened:
        output.last_hidden_state = full_length(prefill, output.last_hidden_state)
    if getattr(output, "router_logits", None) is not None:
        output.router_logits = router_rows(prefill, output.router_logits)
    return output


def full_length(prefill: Prefill, states: Tensor) -> Tensor:
    """States (B, S, D), in which a dropped position gets those of the nearest kept one before it."""
    group = prefill.group.to(states.device)
    kept = torch.zeros(prefill.prompt.real.shape, dtype=torch.long, device=group.index.device)
    kept.scatter_add_(1, group.index, group.valid.long())
    return restore(states, kept > 0)


def router_rows(prefill: Prefill, logits: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Router logits (rows, experts) of each expert layer, without the rows of padding and hidden tokens.

    So a load-balancing loss over all rows is that of the tokens which the layers really worked on. A light layer routes
    rows of text only, and has no others.
    """
    layers = [i for i, layer in enumerate(prefill.adapter.layers) if _routes(layer)]
    if len(layers) != len(logits):
        raise NotImplementedError(
            f"The decoder returned router logits of {len(logits)} layers and has {len(layers)} with experts, so that "
            "their rows cannot be told apart: pass output_router_logits=False, or use keep=1.0."
        )
    found = []
    for layer, rows in zip(layers, logits, strict=True):
        valid = prefill.group_of(layer).valid.flatten().to(rows.device)
        found.append(rows[valid] if len(rows) == len(valid) else rows)
    return tuple(found)


def _routes(layer: Any) -> bool:
    """Whether a decoder layer has experts."""
    return any(hasattr(child, "gate") or hasattr(child, "router") for child in layer.children())


def remember(prefill: Prefill, cache: Cache) -> None:
    """Leave on every layer of the cache what it holds of the sequence."""
    shift, known = _shift(prefill, cache), dict[tuple[int, ...], kv.Pruned]()
    names: dict[int, tuple[int, ...]] = {}
    for layer, held in enumerate(cache.layers):
        if not hasattr(held, "get_seq_length"):  # recurrent layers hold a state, no columns
            continue
        if getattr(held, "keys", held) is None:  # nothing: the layer uses the keys of another one
            continue
        group, old = prefill.group_of(layer), kv.pruned_of(cache, layer)
        names[layer] = name = (*(() if old is None else old.group), group.start)
        if name not in known:
            valid, place = _columns(prefill, cache, layer, group, old)
            dropped = 0 if prefill.hide else prefill.length - group.index.shape[1]
            dropped += 0 if old is None else old.dropped
            worth = _worth(cache, layer, group, valid.shape[1])
            known[name] = kv.Pruned(valid, place, shift, name, bool(valid.all()), dropped=dropped, worth=worth)
    uniform = len(known) == 1
    alone = uniform and shift is None and all(one.full and one.worth is None for one in known.values())
    for layer, name in names.items():
        # safe: the layer has its keys and values already, and nobody reads it before the pass is over
        kv.remember(cache, layer, replace(known[name], uniform=uniform, alone=alone))
    kv.serve(cache, False)


def _shift(prefill: Prefill, cache: Cache) -> Tensor | None:
    """(B,) how much position ids were lowered in all prefills, None where they are the original ones."""
    new = None
    if prefill.renumbered:
        new = prefill.prompt.real.sum(1) - prefill.groups[0].valid.sum(1)
    old = shift_of(cache)
    if old is None:
        return new
    return old if new is None else new + old


def _worth(cache: Cache, layer: int, group: Group, columns: int) -> Tensor | None:
    """What attention adds to the logits of every column that the layer holds now; None where nothing is repaired."""
    old = kv.pruned_of(cache, layer)
    if group.worth is None and (old is None or old.worth is None):
        return None
    new = torch.zeros_like(group.index, dtype=torch.float32) if group.worth is None else group.worth
    return torch.cat([repair.past_columns(cache, layer, new)[:, : columns - new.shape[1]], new], 1)


def _columns(prefill: Prefill, cache: Cache, layer: int, group: Group, old: kv.Pruned | None) -> tuple[Tensor, Tensor]:
    """Validity and original place of every column that the layer holds now."""
    past, valid, place = prefill.past, group.valid, group.index + prefill.past
    if not past:
        return valid, place
    have = kv.stored_length(cache, layer) - group.index.shape[1]  # columns before this call
    before = valid[:, :0] if old is None else old.valid[:, :have].to(valid.device)
    where = place[:, :0] if old is None else old.place[:, :have].to(valid.device)
    tail = have - before.shape[1]
    mask2d = prefill.visibility.mask2d
    text = before.new_ones(len(valid), tail) if mask2d is None else mask2d[:, past - tail : past].bool()
    between = torch.arange(past - tail, past, device=place.device).expand(len(valid), -1)
    return torch.cat([before, text, valid], 1), torch.cat([where, between, place], 1)
