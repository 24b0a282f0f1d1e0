# SPDX-License-Identifier: Apache-2.0
"""Repair after pruning: the keys of kept tokens weigh as much as the tokens that they stand for.

A token that goes is counted for the one that it was merged into, or else for the most similar one of its item that
stays. Attention then adds ``log s`` to the logits of a key that stands for s tokens (proportional attention, as in
2210.09461, eq. 1), and in the prefill ``log(2 - c)``, where c is the mean cosine of the rotary angles between query and
key, which makes up for what RoPE takes from keys far away (after 2606.01711). Steps add ``log s`` alone.

This file owns those numbers and how they enter a mask. It must not know reducers or hooks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from vtoken.engine import cache as kv
from vtoken.engine import masks
from vtoken.ops.ragged import compact, gather

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from vtoken.adapters.base import Adapter
    from vtoken.context import Cut, VisualContext
    from vtoken.engine.prefill import Prefill

BACKENDS = ("eager", "sdpa")
"""Attention backends that add what a mask holds."""


def check_backend(adapter: Adapter) -> None:
    """Refuse attention that no numbers can be added to.

    Raises
    ------
    NotImplementedError
        If the decoder attends by another backend than those of `BACKENDS`.
    """
    backend = adapter.language_model.config._attn_implementation or "eager"
    if backend not in BACKENDS:
        raise NotImplementedError(
            f"repair=True adds to attention logits by a mask, which attn_implementation={backend!r} does not take: "
            "load the model with attn_implementation='sdpa', or leave repair out."
        )


def frequencies(adapter: Adapter, kind: str) -> Tensor:
    """(F,) radians per position of the rotary embedding of layers of a ``kind``.

    Raises
    ------
    NotImplementedError
        If the decoder has none.
    """
    found = {
        name.rpartition(".")[2]: buffer
        for name, buffer in adapter.language_model.named_buffers()
        if name.endswith("inv_freq") and "original" not in name
    }
    if not found:
        raise NotImplementedError(
            f"The decoder of {type(adapter.model).__name__} has no rotary positions, whose distances repair=True "
            "makes up for: leave repair out."
        )
    return found.get(f"{kind}_inv_freq", next(iter(found.values())))


def stands_for(ctx: VisualContext, cut: Cut, counts: Tensor) -> Tensor:
    """(I, N) float: how many tokens each one stands for after a cut, from those before it; 0 for what is gone."""
    keep, counts = ctx.kept(cut), counts.to(cut.keep.device)
    gone, stays = ctx.candidates & ~keep, ctx.candidates & keep
    if not bool(gone.any()) or not bool(stays.any()):
        return counts.masked_fill(~keep, 0.0)
    target = _most_similar(ctx.features, stays)
    if cut.source is not None:
        target = torch.where(cut.source >= 0, cut.source, target)
    left = counts.masked_fill(~keep, 0.0)
    return left.scatter_add(1, target, counts.masked_fill(~gone | ~stays.any(1, keepdim=True), 0.0))


def _most_similar(features: Tensor, stays: Tensor) -> Tensor:
    """(I, N) long: for each token of (I, N, D) the one among ``stays`` (I, N) with the largest cosine."""
    index, valid = compact(stays)
    rows = normalize(features.float(), dim=-1)
    similar = rows @ gather(rows, index).transpose(1, 2)
    return gather(index, similar.masked_fill(~valid[:, None], -torch.inf).argmax(2))


def distance_term(positions: Tensor, radians: Tensor) -> Tensor:
    """(B, n, n): log(2 - c) of queries and keys at ``positions`` (B, n), c the mean cosine of their rotary angles."""
    angles = positions.double()[..., None] * radians.double().to(positions.device)
    waves = torch.cat([angles.cos(), angles.sin()], -1).float()
    return (2 - waves @ waves.transpose(1, 2) / len(radians)).clamp(min=1).log()


def past_columns(cache: Cache | None, layer: int, like: Tensor) -> Tensor:
    """(B, stored) ``log s`` of the columns that a layer holds, none without a cache."""
    if cache is None or layer >= len(cache.layers):
        return like[:, :0]
    have, pruned = kv.stored_length(cache, layer), kv.pruned_of(cache, layer)
    worth = None if pruned is None else pruned.worth
    if worth is None:
        return like.new_zeros(len(like), have)
    worth = worth[:, :have].to(like)
    return pad(worth, (0, have - worth.shape[1]))


def weighed(mask: Any, bias: Tensor, dtype: torch.dtype, causal: bool) -> Tensor:
    """An additive mask with ``bias`` where a key is seen.

    Parameters
    ----------
    mask : Tensor or None
        (B or 1, H or 1, Q, K), bool or additive; None for one that is causal, or sees everything.
    bias : Tensor
        (B, 1 or Q, k): of the columns that hold or will hold something, the last ones of a window.
    """
    if mask is None:
        rows, queries, keys = bias.shape
        every = torch.arange(queries, device=bias.device).expand(rows, -1)
        mask = masks.rows_seen(None, every, (queries, keys), causal)
    columns = mask.shape[-1] - bias.shape[-1]
    bias = pad(bias, (0, columns)) if columns > 0 else bias[..., -columns:]  # a static buffer, or a window
    bias, seen = bias[:, None].to(dtype), masks.seen_in(mask)
    hidden = torch.finfo(dtype).min
    return torch.where(seen, bias if mask.dtype == torch.bool else mask.to(dtype) + bias, hidden)


def weighed_prefill(prefill: Prefill, layer: int, hidden: Tensor, mask: Any) -> Tensor:
    """The mask of a layer of a prefill in which kept tokens weigh as much as those that they stand for.

    Parameters
    ----------
    hidden : Tensor
        (B, n, D).
    mask : Tensor or None
        What the layer would be given.
    """
    adapter, cache, group = prefill.adapter, prefill.visibility.cache, prefill.group.to(hidden.device)
    places = prefill.places.to(hidden.device)
    places = places if prefill.hide else gather(places, group.relative)
    near = distance_term(places, frequencies(adapter, masks.layer_type(adapter, layer)))
    if prefill.prompt.behind is not None:  # tokens behind a prompt are such as steps would bring
        near = near.masked_fill(gather(prefill.prompt.behind.to(near.device), group.index)[..., None], 0.0)
    new: Any = group.worth
    bias = new[:, None] + near * (group.visual & group.valid)[:, None]
    source = adapter.kv_source(layer)
    past = past_columns(cache, source, new)
    past = past if source == layer else past[:, : past.shape[1] - new.shape[1]]
    bias = torch.cat([past[:, None].expand(-1, bias.shape[1], -1), bias], 2)
    return weighed(mask, bias, hidden.dtype, masks.is_causal(adapter.attention(adapter.layers[layer]), {}))


def weighed_step(adapter: Adapter, index: int, mask: Any, cache: Cache, hidden: Tensor) -> Tensor:
    """The mask of layer ``index`` in a pass without new pictures, with ``log s`` of the columns in its cache.

    Parameters
    ----------
    mask : Tensor or None
        What the layer would be given.
    hidden : Tensor
        (B, Q, D).
    """
    source = adapter.kv_source(index)
    pruned: Any = kv.pruned_of(cache, source)
    if pruned.buffer is not None:
        return weighed(mask, pruned.worth[:, None].to(hidden.device), hidden.dtype, True)
    rows, queries = hidden.shape[:2]
    old = past_columns(cache, source, hidden.new_zeros(rows, 0, dtype=torch.float32))
    new = 0 if source != index else queries  # a layer that uses another one's keys finds them stored
    bias = pad(old, (0, new))[:, None].expand(-1, queries, -1)
    block = adapter.attention(adapter.layers[index])
    return weighed(mask, bias, hidden.dtype, masks.is_causal(block, {}))
