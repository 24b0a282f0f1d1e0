# SPDX-License-Identifier: Apache-2.0
"""Who may see whom: padding, documents, windows, hidden and dropped tokens, static buffers.

The only file with such rules. Every mask that a layer is given after a cut, and every mask that a reader of attention
applies, is made here: by transformers' own mask functions from the validity of columns, or by taking rows and columns
of a mask that the caller or transformers prepared for the whole sequence. This file must not know reducers.

Shapes: B rows, S new tokens of a call, n of them after a cut, K keys (cached ones first).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import create_sliding_window_causal_mask

from vtoken.compat import causal_mask
from vtoken.engine.cache import is_static, logical_length, one_layer, pruned_of, stored_length
from vtoken.ops.ragged import gather

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from vtoken.adapters.base import Adapter

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
CHUNKED = "chunked_attention"
LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Arguments that say where the documents of a packed row begin."""
WINDOWS = {SLIDING: "sliding_window", CHUNKED: "attention_chunk_size"}
"""Kinds of layers that see a part of the sequence only, and the name under which a config says how long that is."""


# ---------------------------------------------------------------------------------------------------- kinds of layers
def layer_type(adapter: Adapter, layer: int) -> str:
    """``"full_attention"``, ``"sliding_attention"``, ``"linear_attention"`` ..."""
    if not adapter.has_attention(adapter.layers[layer]):  # configurations have many names for what is recurrent
        return LINEAR
    config = adapter.language_model.config
    if types := getattr(config, "layer_types", None):
        return adapter.kind_names.get(types[layer], types[layer])
    if getattr(config, "sliding_window", None) is None:
        return FULL
    code = vars(sys.modules[type(adapter.language_model).__module__])  # Llama's config may name a window it never uses
    return SLIDING if create_sliding_window_causal_mask.__name__ in code else FULL


def mask_name(adapter: Adapter, layer: int) -> str:
    """Name under which the language model looks up the mask of a layer, where it has several by kind."""
    types = getattr(adapter.language_model.config, "layer_types", None)
    return adapter.kind_names.get(types[layer], types[layer]) if types else layer_type(adapter, layer)


def is_flash(adapter: Adapter) -> bool:
    """Whether the decoder attends by flash attention, which is given no mask beyond padding."""
    return "flash" in (adapter.language_model.config._attn_implementation or "")


def is_prepared(mask: Any) -> bool:
    """Whether a mask, or the first of several by kind of layer, is one of queries and keys, not of columns."""
    if isinstance(mask, Mapping):
        mask = next((one for one in mask.values() if one is not None), None)
    return is_block_mask(mask) or (isinstance(mask, Tensor) and mask.dim() == 4)


def is_block_mask(mask: Any) -> bool:
    """Whether it is flex attention's."""
    return hasattr(mask, "mask_mod")


def hidden_value(mask: Tensor) -> Tensor:
    """What a prepared mask (bool or additive) holds where a key is hidden."""
    value = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return torch.tensor(value, dtype=mask.dtype, device=mask.device)


def seen_in(mask: Tensor) -> Tensor:
    """A prepared mask as bool; in an additive one a key counts as seen unless it is (all but) minus infinity."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


# --------------------------------------------------------------------------------------------------------- validation
def window_of(adapter: Adapter, kind: str) -> int | None:
    """Tokens that a layer of a kind looks back, or the length of its chunks; None if it sees all."""
    return getattr(adapter.language_model.config, WINDOWS.get(kind, ""), None) or None


def exceeded_window(adapter: Adapter, first_layer: int, length: int) -> str | None:
    """In words the windows of layers from ``first_layer`` on, if ``length`` tokens are more and there are any."""
    kinds = {layer_type(adapter, i) for i in range(first_layer, len(adapter.layers))}
    for kind, words in ((SLIDING, "a sliding window of {} tokens"), (CHUNKED, "chunks of {} tokens")):
        window = window_of(adapter, kind)
        if kind in kinds and window and length > window:
            return words.format(window)
    return None


def check_flash_window(adapter: Adapter, first_layer: int, length: int) -> None:
    """Refuse a cut where flash attention, which gets no mask, would count a window over the tokens that are there.

    Raises
    ------
    NotImplementedError
        If ``length`` tokens exceed the window of a layer from ``first_layer`` on.
    """
    counted = is_flash(adapter) and not adapter.recounts
    if counted and (window := exceeded_window(adapter, first_layer, length)) is not None:
        raise NotImplementedError(
            f"Under flash attention {window} would be counted over kept tokens only: "
            "use attn_implementation='sdpa' for prompts that are longer than that."
        )


def check_turn_window(adapter: Adapter, cache: Any, length: int) -> None:
    """Sliding windows are exact in a first prompt and in single steps, which know the original distances.

    Raises
    ------
    NotImplementedError
        If a further prompt, or a static cache, exceeds the window.
    """
    if is_static(cache):
        length = max(layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer))
    elif adapter.recounts:
        return
    if (window := exceeded_window(adapter, 0, length)) is not None:
        raise NotImplementedError(
            f"This model attends in {window}. Its meaning is kept in a first prompt "
            "with a dynamic cache, not in a StaticCache or a further prompt on a pruned cache beyond the window: "
            "use a dynamic cache, and a new one for each turn."
        )


# ------------------------------------------------------------------------------------------------- reading given masks
def real_tokens(mask: Any, embeds: Tensor, past: int, cache: Any) -> Tensor:
    """(B, S) bool: new tokens that are there, from whatever mask the language model was given.

    In a prepared mask that is every token which sees itself: padding, and what the caller hides, does not, while the
    first documents of a packed row do, though the last query of the row sees nothing of them.
    """
    mask = _plainest(mask)
    rows, length = embeds.shape[:2]
    if mask is None:
        return torch.ones(rows, length, dtype=torch.bool, device=embeds.device)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask[:, -length:].bool().expand(rows, -1).to(embeds.device)
    at = torch.arange(length, device=embeds.device)
    return _pairs(mask, rows, at, at + _first_column(mask, length, past, cache)).to(embeds.device)


def documents_of(
    mask: Any, position_ids: Tensor | None, starts_at: Any, cache: Any, fills: bool, real: Tensor, flash: bool
) -> Tensor | None:
    """Which document of its row each new token belongs to, where a row packs several.

    They are what the attention backend itself would separate: by a block-diagonal mask, by ``cu_seq_lens_q`` (flash
    attention), or by position ids that start again where there is neither a mask nor a cache to fill (flash attention:
    neither a mask nor a second row).

    Parameters
    ----------
    mask, position_ids, cache
        What the language model was called with.
    starts_at : Tensor or None
        The argument ``cu_seq_lens_q``.
    fills : bool
        Whether the pass fills a cache.
    real : Tensor
        (B, S) bool.
    flash : bool
        Whether the backend is flash attention.

    Returns
    -------
    Tensor or None
        (B, S) long from 0; None where every row is one document.
    """
    mask = _plainest(mask)
    text = text_positions(position_ids)
    if is_prepared(mask):
        starts = _blind_to_predecessor(mask, real, logical_length(cache), cache)
    elif flash and starts_at is not None:
        starts = real.new_zeros(real.numel() + 1)
        starts[starts_at.long().to(real.device)] = True
        starts = starts[:-1].view(real.shape)
    elif text is None or (len(real) > 1 if flash else fills) or not (mask is None or (flash and bool(mask.all()))):
        return None
    else:
        starts = pad(text.diff(dim=-1) != 1, (1, 0)).expand(real.shape).to(real.device)
    if not bool(starts[:, 1:].any()):
        return None
    return pad(starts[:, 1:].cumsum(1), (1, 0))


def _plainest(mask: Any) -> Any:
    """The mask without windows, of several by kind of layer."""
    return mask.get(FULL, next(iter(mask.values()))) if isinstance(mask, Mapping) else mask


def text_positions(position_ids: Tensor | None) -> Tensor | None:
    """The (B, S) ids by which transformers finds packed documents; None where the given ones are not used for that."""
    if position_ids is None or position_ids.dim() == 2:
        return position_ids
    return position_ids[0] if len(position_ids) == 4 else None  # M-RoPE: text, time, height, width


def _blind_to_predecessor(mask: Any, real: Tensor, past: int, cache: Any) -> Tensor:
    """(B, S) bool: real tokens that do not see the real token before them."""
    length = real.shape[1]
    at = torch.arange(length, device=real.device)
    last = torch.where(real, at, -1).cummax(1).values
    before = pad(last[:, :-1], (1, 0), value=-1)
    first = _first_column(mask, length, past, cache)
    seen = _pairs(mask, len(real), at.expand(real.shape), before.clamp(min=0) + first).to(real.device)
    return real & (before >= 0) & ~seen


def _first_column(mask: Any, length: int, past: int, cache: Any) -> int:
    """Where the new tokens begin in a prepared mask."""
    return past if is_static(cache) else mask.shape[-1] - length


def _pairs(mask: Any, rows: int, query: Tensor, key: Tensor) -> Tensor:
    """(B, Q) bool: whether each ``query`` row of a prepared mask sees the ``key`` column beside it."""
    query, key = query.expand(rows, -1), key.expand(rows, -1)
    if is_block_mask(mask):
        batch = torch.arange(rows, device=query.device)[:, None]
        return mask.mask_mod(batch, torch.zeros_like(batch), query, key)
    table = seen_in(mask)[:, 0].expand(rows, -1, -1)
    batch = torch.arange(rows, device=mask.device)[:, None]
    return table[batch, query.to(mask.device), key.to(mask.device)]


def is_causal(module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether an attention module that is given no prepared mask sees only what comes before."""
    causal = kwargs.get("is_causal")
    return getattr(module, "is_causal", True) if causal is None else causal


def rows_seen(
    mask: Any,
    rows: Tensor,
    shape: tuple[int, int],
    causal: bool,
    window: int | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """What some queries of a layer see, from whatever mask its backend was given.

    Parameters
    ----------
    mask : Tensor, BlockMask or None
        4-D (bool or additive), 2-D over columns (flash attention), flex attention's, or none.
    rows : Tensor
        (B, R) long: queries.
    shape : (Q, K)
        Queries and keys of the layer.
    causal : bool
        Whether a layer without a prepared mask sees only what comes before.
    window : int, optional
        Of a layer without a prepared mask.
    documents : Tensor, optional
        (B, Q) long: the document of each new token; the last Q keys are theirs.

    Returns
    -------
    Tensor
        (B, 1 or H, R, K), bool or additive as the mask is.
    """
    queries, keys = shape
    columns = torch.arange(keys, device=rows.device)
    if is_block_mask(mask):
        batch = torch.arange(len(rows), device=rows.device)[:, None, None]
        seen = mask.mask_mod(batch, torch.zeros_like(batch), rows[..., None], columns)
        return seen.expand(*rows.shape, keys)[:, None]
    if mask is not None and mask.dim() == 4:
        seen = mask.expand(len(rows), *mask.shape[1:])
        return seen.gather(2, rows[:, None, :, None].expand(-1, seen.shape[1], -1, seen.shape[-1]))[..., :keys]
    seen = rows.new_ones(*rows.shape, keys, dtype=torch.bool)
    if causal:
        behind = rows[..., None] + (keys - queries) - columns
        seen = (behind >= 0) & (behind < (window or keys))
    if mask is not None:
        seen = seen & mask[:, None, -keys:].bool()
    if documents is not None:
        own = documents.gather(1, rows)[..., None] == documents[:, None]
        seen = seen & pad(own, (keys - queries, 0), value=True)
    return seen[:, None]


# --------------------------------------------------------------------------------------------- masks by transformers
def build_mask(
    adapter: Adapter,
    layer: int,
    hidden: Tensor,
    mask: Tensor | None,
    cache: Cache | None,
    position_ids: Tensor | None = None,
    kind: str | None = None,
) -> Any:
    """The mask of one layer from the 2-D validity of its columns.

    ``kind`` is that of the layer, unless the columns say already what a window of it hides.
    """
    kind = kind or layer_type(adapter, layer)
    if "linear" in kind:  # recurrent layers want the padding of the new tokens only
        new = None if mask is None else mask[:, -hidden.shape[1] :]
        return None if new is None or bool(new.all()) else new
    cache, more = one_layer(cache, layer), dict[str, Any]()
    if kind not in (FULL, *WINDOWS):  # an indexer, say, looks at the mask itself
        more["allow_is_causal_skip"] = False
    if position_ids is not None:
        more["position_ids"] = position_ids
    return causal_mask(kind, adapter.language_model.config, mask, cache, hidden, **more)


def gather_mask(mask: Any, index: Tensor, valid: Tensor, past: int = 0) -> Any:
    """Cut the rows and the new columns of a prepared mask.

    Parameters
    ----------
    mask : Tensor or BlockMask
        (B or 1, H or 1, S, KV) bool or additive; columns ``past : past + S`` are the new tokens. In a static cache
        KV is larger than that, and the freed slots become hidden.
    index, valid : Tensor
        As returned by `compact`.

    Returns
    -------
    Tensor or BlockMask
        (B, H or 1, n, past + n), or (B, H or 1, n, KV) for a static cache.
    """
    if is_block_mask(mask):
        return _gather_block_mask(mask, index, valid, past)
    rows, n = index.shape
    mask = mask.expand(rows, -1, -1, -1)
    kv, length = mask.shape[-1], mask.shape[2]
    cut = gather(mask, index, dim=2)
    off = hidden_value(mask)
    new = gather(cut[..., past : past + length], index, dim=3)
    new = torch.where(valid[:, None, None, :].to(cut.device), new, off)
    parts = [cut[..., :past], new]
    if (unused := kv - past - length) > 0:
        parts.append(off.expand(rows, cut.shape[1], n, unused + length - n))
    return torch.cat(parts, -1)


def _gather_block_mask(mask: Any, index: Tensor, valid: Tensor, past: int) -> Any:
    """A block mask whose rule asks the given one about the tokens that stand there now."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, n = index.shape
    rule = mask.mask_mod
    where = torch.cat([torch.arange(past, device=index.device).expand(rows, -1), index + past], 1)
    there = pad(valid, (past, 0), value=True)

    def cut(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return there[batch, key] & rule(batch, head, index[batch, query], where[batch, key])

    return create_block_mask(cut, rows, None, n, past + n, device=str(index.device))


def hide_columns(mask: Any, columns: Tensor, unprepared: Tensor | None) -> Any:
    """Hide ``columns`` (B, past + S) that are False in a prepared mask; ``unprepared`` replaces a 2-D mask or none."""
    if isinstance(mask, Mapping):
        return {kind: hide_columns(one, columns, unprepared) for kind, one in mask.items()}
    if not is_prepared(mask):
        return unprepared
    if is_block_mask(mask):
        rows, length = len(columns), mask.shape[-2]
        everything = torch.arange(length, device=columns.device).expand(rows, -1)
        return _gather_block_mask(mask, everything, columns[:, -length:], columns.shape[1] - length)
    known = columns.shape[1]
    seen = torch.where(columns[:, None, None], mask[..., :known], hidden_value(mask))
    return torch.cat([seen, mask[..., known:]], -1)


# ----------------------------------------------------------------------------------------------- steps on pruned caches
def columns_of(
    cache: Cache,
    index: int,
    query: int,
    mask: Tensor | None = None,
    near: Callable[[Tensor, int], Tensor] | None = None,
) -> Tensor | None:
    """Validity of the columns that layer ``index`` of a pruned cache will attend to; None if all are valid.

    Parameters
    ----------
    query : int
        Number of new tokens.
    mask : Tensor, optional
        The caller's mask over the logical sequence, (B, L).
    near : callable, optional
        For the places (B, n) of columns in the *original* sequence and that of the single query, which of them its
        window holds (transformers counts stored columns).

    Returns
    -------
    Tensor or None
        (B, logical length) for dynamic layers, in the coordinates of transformers' mask code;
        (B, buffer length) for static ones, a constant shape that can be compiled.
    """
    pruned: Any = pruned_of(cache, index) or pruned_of(cache)
    if pruned.buffer is not None:
        return None if pruned.full else pruned.buffer
    have = stored_length(cache, index)
    stored = pruned.valid[:, :have]
    tail = have + query - stored.shape[1]
    if mask is not None:
        valid = torch.cat([stored, mask[:, mask.shape[1] - tail :].to(stored)], 1)
    elif pruned.full and near is None:
        return None
    else:
        valid = torch.cat([stored, stored.new_ones(stored.shape[0], tail)], 1)
    if near is not None:
        now = have + pruned.dropped  # index of the single query
        since = torch.arange(now + query - tail, now + query, device=stored.device).expand(len(stored), -1)
        valid = valid & near(torch.cat([pruned.place[:, :have], since], 1), now)
    return pad(valid, (pruned.dropped, 0)) if pruned.dropped else valid


def in_window(kind: str, window: int | None, mask: Tensor | None) -> Callable[[Tensor, int], Tensor] | None:
    """What `columns_of` asks about the windows of a kind of layer; None if it sees all.

    Chunks are counted from the first token behind the padding of a row, which the caller's ``mask`` (B, L) tells.
    """
    if window is None:
        return None
    if kind == SLIDING:
        return lambda place, now: place > now - window
    padding: Any = 0 if mask is None else (mask.cumsum(1) == 0).sum(1, keepdim=True)
    return lambda place, now: (place - padding) // window == (now - padding) // window


def step_mask(cache: Cache, index: int, given: Tensor) -> Tensor:
    """The prepared mask of layer ``index`` for one new token, from the one of another full-attention layer.

    Both stored the tokens since the pruned prefill. So nothing is asked of transformers' mask code, which would
    wait for the device to see whether all columns are valid.

    Parameters
    ----------
    given : Tensor
        (B, 1, 1, columns of the other layer), boolean or additive, or (B, columns) for flash attention.
    """
    pruned: Any = pruned_of(cache, index)
    stored = pruned.valid[:, : stored_length(cache, index)]
    tail = stored_length(cache, index) + 1 - stored.shape[1]
    return torch.cat([_like(given, stored), given[..., given.shape[-1] - tail :]], -1)


def static_step_mask(cache: Cache, index: int, given: Tensor, counted: bool = False) -> Tensor:
    """`step_mask` for a static layer: what it has written, which its own counter tells, and the new token.

    ``counted`` says that the layer has run in this step, so that its counter knows the new token already.

    Only tensors of constant shapes are used, so that a compiled step serves every prompt.
    """
    layer: Any = cache.layers[index]
    written = torch.arange(layer.max_cache_len, device=given.device) <= layer.cumulative_length - int(counted)
    return _like(given, layer.pruned.buffer & written)


def _like(given: Tensor, columns: Tensor) -> Tensor:
    """Columns (B, n) bool for a single query, as ``given`` is: boolean or additive 4-D, or 2-D."""
    seen = (columns if given.dim() == 2 else columns[:, None, None]).expand(*given.shape[:-1], -1)
    if given.is_floating_point():
        return torch.zeros_like(seen, dtype=given.dtype).masked_fill(~seen, torch.finfo(given.dtype).min)
    return seen.to(given.dtype)


# ------------------------------------------------------------------------------------------------------ one prefill
class Visibility:
    """Who may see whom in one pass that brings new visual tokens, before and after cuts.

    Parameters
    ----------
    adapter : Adapter
        Where things are in the model.
    kwargs : mapping
        Arguments of the language model, with the mask and the position ids of the whole call.
    cache : Cache or None
        The one given.
    real : Tensor
        (B, S) bool.
    documents : Tensor or None
        (B, S), see `documents_of`.
    past : int
        Logical length of the cache before the call.
    """

    def __init__(
        self,
        adapter: Adapter,
        kwargs: Mapping[str, Any],
        cache: Cache | None,
        real: Tensor,
        documents: Tensor | None,
        past: int,
    ) -> None:
        self.adapter, self.cache, self.real, self.documents, self.past = adapter, cache, real, documents, past
        self.given, self.position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        self.mask2d = self.given if isinstance(self.given, Tensor) and self.given.dim() == 2 else None
        self.flash = is_flash(adapter)
        self.first = {mask_name(adapter, i): i for i in reversed(range(len(adapter.layers)))}  # layer of each kind
        self._whole: Any = None

    def past_columns(self, layer: int) -> Tensor:
        """(B, past) validity of the columns before the new tokens, in the mask coordinates of the layer."""
        found = None
        if self.past:
            found = None if self.mask2d is None else self.mask2d[:, : self.past].bool()
            if pruned_of(self.cache) is not None:
                found = columns_of(self.cache, layer, 0, found)  # type: ignore[arg-type]
        if found is None:
            return self.real.new_ones(self.real.shape[0], self.past)
        return found.to(self.real.device)

    def columns(self, layer: int, valid: Tensor) -> Tensor:
        """(B, past + n) validity of cached columns and of the new ones ``valid`` (B, n)."""
        return torch.cat([self.past_columns(layer), valid], 1)

    def after_drop(self, index: Tensor, valid: Tensor, full: Tensor, short: Tensor) -> Any:
        """The mask argument of the language model for the tokens ``index`` (B, n), ``valid`` (B, n).

        Never None where layers could read gapped position ids as packed documents: flash attention is told of
        documents by `varlen`.

        Parameters
        ----------
        full, short : Tensor
            (B, S, D) and (B, n, D): the embeddings before and after the drop.
        """
        columns = self.columns(0, valid)
        if self.adapter.recounts:  # the masks of a shorter prompt
            return columns
        whole = self._prepared(full)

        def shorter(mask: Any, kind: str | None = None) -> Any:
            if is_prepared(mask):
                start = _first_column(mask, self.real.shape[1], self.past, self.cache)
                return gather_mask(mask, index, valid, start)
            if mask is None and kind:  # prepared by generate() or the outer model: the language model will not look
                skip = bool(columns.all()) and layer_type(self.adapter, self.first[kind]) in (FULL, LINEAR, *WINDOWS)
                return None if skip else self._built(kind, short, columns)
            return columns

        if isinstance(whole, Mapping):
            return {kind: shorter(mask, kind) for kind, mask in whole.items()}
        return None if self.flash and self.documents is not None else shorter(whole)

    def after_hiding(self, keep: Tensor, full: Tensor) -> Any:
        """The mask argument of the language model in which new tokens that are not in ``keep`` (B, S) are hidden."""
        if self.flash and self.documents is not None:
            raise NotImplementedError(
                "backend='mask' hides tokens by a mask, which flash attention does not take for packed rows: use "
                "backend='drop', or attn_implementation='sdpa'."
            )
        columns, whole = self.columns(0, keep), self._prepared(full)
        if not isinstance(whole, Mapping):
            return hide_columns(whole, columns, columns)
        return {  # a mask is None where transformers left it out, as it was causal and nothing else
            kind: hide_columns(mask, columns, None) if is_prepared(mask) else self._built(kind, full, columns)
            for kind, mask in whole.items()
        }

    def of_layer(self, layer: int, given: Any, valid: Tensor, relative: Tensor, hidden: Tensor, hide: bool) -> Any:
        """The mask of a layer behind a cut inside of the decoder.

        Parameters
        ----------
        given : mask
            What the language model gives the layer: the one of the sequence that it was called with.
        valid, relative : Tensor
            (B, n): the layer's tokens, as positions in that sequence.
        hidden : Tensor
            (B, n, D).
        hide : bool
            Whether tokens are hidden instead of dropped.
        """
        columns = self.columns(layer, valid)
        if is_prepared(given) and hide:
            return hide_columns(given, columns, None)
        if self.flash and self.documents is not None:
            return None
        own = is_block_mask(given) and self._whole is None and not is_prepared(self.given) and self.documents is None
        if is_prepared(given) and not self.past and not own:  # a block mask of columns alone is cheaper built anew
            return gather_mask(given, relative, valid)
        return build_mask(self.adapter, layer, hidden, columns, self.cache)

    def varlen(self, index: Tensor, valid: Tensor) -> dict[str, Any]:
        """Arguments that tell flash attention the documents of what is left, where a row packs several."""
        if not self.flash or self.documents is None:
            return {}
        if len(index) > 1:
            raise NotImplementedError(
                f"{len(index)} packed rows under flash attention: it takes several documents in one row only, so "
                "flatten the batch into a single row, or use attn_implementation='sdpa'."
            )
        counts = torch.bincount(self.documents.gather(1, index)[valid])
        starts = pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        longest = int(counts.max())
        return {
            "cu_seq_lens_q": starts,
            "cu_seq_lens_k": starts,
            "max_length_q": longest,
            "max_length_k": longest,
        }

    def _built(self, kind: str, embeds: Tensor, columns: Tensor | None, ids: Tensor | None = None) -> Any:
        """`build_mask` for the layers of a kind."""
        return build_mask(self.adapter, self.first[kind], embeds, columns, self.cache, ids)

    def _prepared(self, embeds: Tensor) -> Any:
        """The given mask; or those of the whole sequence by kind of layer, where what is left cannot tell them.

        A window is counted, and documents are told apart, in the original sequence.
        """
        length = self.past + self.real.shape[1]
        packed = self.documents is not None and not self.flash
        if is_prepared(self.given) or isinstance(self.given, Mapping):
            return self.given
        if not packed and exceeded_window(self.adapter, 0, length) is None:
            return self.given
        if self._whole is None:
            columns = None if packed else self.columns(0, self.real)
            ids = text_positions(self.position_ids) if packed else None
            masks = {kind: self._built(kind, embeds, columns, ids) for kind in self.first}
            typed = getattr(self.adapter.language_model.config, "layer_types", None)
            self._whole = masks if typed else next(iter(masks.values()))
        return self._whole


def of_rows(mask: Any, row: Tensor) -> Any:
    """A block mask of the batch rows ``row`` (P,), for a reader of it."""
    return _Rule(lambda batch, head, query, key: mask.mask_mod(row[batch], head, query, key))


def new_columns(mask: Any, length: int, cache: Cache | None, layer: int) -> Any:
    """A prepared mask with the columns of ``length`` new tokens alone, for a layer that has not stored them yet.

    They are the last ones, unless the cache is static: then its free columns follow.
    """
    first = stored_length(cache, layer) if cache is not None and is_static(cache) else mask.shape[-1] - length
    if not is_block_mask(mask):
        return mask[..., first : first + length]
    return _Rule(lambda batch, head, query, key: mask.mask_mod(batch, head, query, key + first))


class _Rule:
    """A block mask as readers need it: the rule alone."""

    def __init__(self, mask_mod: Any) -> None:
        self.mask_mod = mask_mod
