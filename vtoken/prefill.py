# SPDX-License-Identifier: Apache-2.0
"""One pruned prefill: which rows each decoder layer sees, and what the cache must remember of it.

A prefill is a list of *groups*: from layer ``start`` on, the sequence consists of the tokens ``index``, compacted to
the right (left padding). Masks, rotary tables and position ids of a layer are taken from its group.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from vtoken import attention as att
from vtoken.cache import CacheState, is_static, make_mask, make_virtual, one_layer, stored_length
from vtoken.context import Attention, Cut, VisualContext
from vtoken.sequence import compact, gather, gather_mask, hidden_value, restore

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from vtoken.adapters.base import Adapter


@dataclass
class Group:
    """The sequence that layers from ``start`` on work on.

    Parameters
    ----------
    index : Tensor
        (B, n) long: the kept tokens, as positions in the call's S tokens.
    relative : Tensor
        (B, n) long: the same as positions in the first group, the sequence that the language model was given.
    valid : Tensor
        (B, n) bool: False on padding (and, with the mask backend, on hidden tokens).
    masks : dict
        Attention mask by layer type.
    """

    start: int
    index: Tensor
    relative: Tensor
    valid: Tensor
    masks: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> Group:
        """Follow a model whose layers live on several devices."""
        self.index, self.relative, self.valid = (x.to(device) for x in (self.index, self.relative, self.valid))
        return self


def layer_type(adapter: Adapter, layer: int) -> str:
    """``"full_attention"``, ``"sliding_attention"``, ``"linear_attention"`` ..."""
    config = adapter.language_model.config
    if types := getattr(config, "layer_types", None):
        return types[layer]
    return "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"


def build_mask(adapter: Adapter, layer: int, hidden: Tensor, mask: Tensor | None, cache: Cache | None) -> Any:
    """The mask of one layer from the 2-D validity of its columns, by transformers' own functions."""
    kind = layer_type(adapter, layer)
    if "linear" in kind:  # recurrent layers want the padding of the new tokens only
        new = None if mask is None else mask[:, -hidden.shape[1] :]
        return None if new is None or bool(new.all()) else new
    make = create_sliding_window_causal_mask if kind == "sliding_attention" else create_causal_mask
    return make_mask(make, adapter.language_model.config, hidden, mask, one_layer(cache, layer))


def _rows(tables: Any, index: Tensor) -> Any:
    """The rows ``index`` (B, n) of rotary tables (..., S, d), of which a layer gets one or several."""
    if not isinstance(tables, Tensor):
        return tuple(_rows(table, index) for table in tables)
    return gather(tables, index, dim=tables.dim() - 2, batch=tables.dim() - 3)


class Prefill:
    """The state of one forward pass that brings new visual tokens.

    Parameters
    ----------
    adapter : Adapter
        Where things are in the model.
    ctx : VisualContext
        The sequence as the language model was called with it.
    real : Tensor
        (B, S) bool: tokens that are not padding.
    mask2d : Tensor or None
        The caller's mask over past and new tokens.
    past : int
        Logical length of the cache before the call.
    hide : bool
        True hides tokens by masks instead of dropping them (the oracle of the tests).
    """

    def __init__(
        self,
        adapter: Adapter,
        ctx: VisualContext,
        real: Tensor,
        cache: Cache | None,
        state: CacheState | None,
        mask2d: Tensor | None,
        past: int,
        hide: bool,
    ) -> None:
        self.adapter, self.ctx, self.real, self.cache, self.state = adapter, ctx, real, cache, state
        self.mask2d, self.past, self.hide = mask2d, past, hide
        self.length = real.shape[1]
        self.moved = False  # the language model got other rows than the caller passed
        self.renumbered = False
        self.aside = False  # a layer runs on other rows than those of the group at work
        everything = torch.arange(self.length, device=real.device).expand(real.shape)
        self.groups = [Group(0, everything, everything, real)]

    # ------------------------------------------------------------------ before the language model
    def cut_inputs(self, cut: Cut | None, kwargs: dict[str, Any], positions: str) -> dict[str, Any]:
        """Apply the cut before the language model to its keyword arguments."""
        keep, given = self._apply(cut) & self.real, kwargs.get("position_ids")
        if self.ctx.hidden is not kwargs["inputs_embeds"]:
            kwargs = {**kwargs, "inputs_embeds": self.ctx.hidden}
        nothing = cut is None or bool((keep == self.real).all())
        mask = kwargs.get("attention_mask")
        if not nothing:
            self._check_window(0)
        if self.hide:
            self._hide_from_context(keep)
            if not nothing:
                columns = torch.cat([self.past_columns(0), keep], 1)
                kwargs = {**kwargs, "attention_mask": self._hidden_mask(mask, columns, columns)}
            self.groups = [Group(0, self.groups[0].index, self.groups[0].relative, keep)]
        elif not nothing:
            kwargs = self._drop(keep, kwargs)
        elif self.state is not None and not isinstance(mask, dict):
            kwargs = {**kwargs, "attention_mask": torch.cat([self.past_columns(0), self.real], 1)}
        shifted = self.state is not None and self.state.shift is not None
        if positions == "compact" and not self.hide and (shifted or not nothing):
            kwargs = {**kwargs, "position_ids": self._renumber(given)}
        return kwargs

    def _renumber(self, position_ids: Tensor | None) -> Tensor:
        """(B, n) consecutive ids of the kept tokens, from the id that the first token of the call had."""
        self.renumbered = True
        group = self.groups[0]
        if position_ids is None:
            position_ids = torch.arange(self.past, self.past + self.length, device=group.index.device)[None]
        if position_ids.dim() != 2:
            raise NotImplementedError(
                "positions='compact' is defined for 1-D position ids only, this model uses M-RoPE: "
                "pass positions='keep'."
            )
        first = gather(position_ids, self.real.to(torch.int8).argmax(1, keepdim=True))
        if self.state is not None and self.state.shift is not None:
            first = first - self.state.shift[:, None].to(first.device)
        return (group.valid.cumsum(1) - 1).clamp(min=0) + first

    def _drop(self, keep: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        # A row may be cut although the tensor does not shrink (its longest row has no image): it is re-aligned too.
        index, valid = compact(keep)
        self.moved = True
        kwargs = self._shorten(kwargs, index, valid)
        self._narrow(index, valid, kwargs["inputs_embeds"])
        everything = torch.arange(index.shape[1], device=index.device).expand(index.shape)
        self.groups = [Group(0, index, everything, valid)]
        return kwargs

    def _shorten(self, kwargs: dict[str, Any], index: Tensor, valid: Tensor) -> dict[str, Any]:
        kwargs, full = dict(kwargs), kwargs["inputs_embeds"]
        position_ids = kwargs.get("position_ids")
        if position_ids is None:
            position_ids = torch.arange(self.past, self.past + self.length, device=index.device)[None]
        kwargs["inputs_embeds"] = gather(kwargs["inputs_embeds"], index)
        kwargs["position_ids"] = gather(position_ids, index, dim=position_ids.dim() - 1, batch=position_ids.dim() - 2)
        columns = torch.cat([self.past_columns(0), valid], 1)
        embeds = kwargs["inputs_embeds"]

        def shorter(mask: Any, kind: str | None = None) -> Any:
            if isinstance(mask, Tensor) and mask.dim() == 4:
                return gather_mask(mask, index, valid, self._prepared_past(mask))
            if mask is None and kind:  # prepared by generate() or the outer model: the language model will not look
                layers = range(len(self.adapter.layers))
                layer = next(i for i in layers if layer_type(self.adapter, i) == kind)
                return None if bool(columns.all()) else build_mask(self.adapter, layer, embeds, columns, self.cache)
            return columns  # never None: gapped position ids without a mask are read as packed sequences

        mask = self._windowed_masks(kwargs.get("attention_mask"), full)
        if isinstance(mask, dict):
            kwargs["attention_mask"] = {kind: shorter(m, kind) for kind, m in mask.items()}
        else:
            kwargs["attention_mask"] = shorter(mask)
        return self.adapter.cut_extras(kwargs, index, valid)

    def _windowed_masks(self, mask: Any, embeds: Tensor) -> Any:
        """Sliding windows are counted in the original sequence: prepare such masks before rows are dropped."""
        prepared = isinstance(mask, dict) or (mask is not None and mask.dim() == 4)
        if prepared or self._exceeded_window(0) is None:
            return mask
        layers = {layer_type(self.adapter, i): i for i in reversed(range(len(self.adapter.layers)))}
        columns = torch.cat([self.past_columns(0), self.real], 1)
        masks = {kind: build_mask(self.adapter, i, embeds, columns, self.cache) for kind, i in layers.items()}
        typed = getattr(self.adapter.language_model.config, "layer_types", None)
        return masks if typed else masks["sliding_attention"]

    def _exceeded_window(self, layer: int) -> int | None:
        """The sliding window of layers from ``layer`` on, if the sequence is longer and there are such layers."""
        window = getattr(self.adapter.language_model.config, "sliding_window", None) or 0
        slide = any(layer_type(self.adapter, i) == "sliding_attention" for i in range(layer, len(self.adapter.layers)))
        return window if slide and self.past + self.length > window else None

    def _check_window(self, layer: int) -> None:
        """Flash attention gets no mask: it counts a window over the tokens that are there."""
        if "flash" not in (self.adapter.language_model.config._attn_implementation or ""):
            return
        if (window := self._exceeded_window(layer)) is not None:
            raise NotImplementedError(
                f"Under flash attention the sliding window of {window} tokens would be counted over kept tokens only: "
                "use attn_implementation='sdpa' for prompts that are longer than the window."
            )

    # ------------------------------------------------------------------ at a decoder layer
    def cut_layer(self, layer: int, hidden: Tensor, cut: Cut | None) -> Tensor:
        """Apply a cut before decoder layer ``layer``; returns the hidden states it works on."""
        group = self.groups[-1].to(hidden.device)
        if cut is None:
            return hidden
        keep = self._apply(cut) & group.valid
        hidden = self.ctx.hidden
        changed = not torch.equal(keep, group.valid)
        if changed:
            self._check_window(layer)
        if self.hide:
            self._hide_from_context(keep)
            group = Group(layer, group.index, group.relative, keep)
        elif changed:
            index, valid = compact(keep)
            hidden = gather(hidden, index)
            self._narrow(index, valid, hidden)
            group = Group(layer, gather(group.index, index), gather(group.relative, index), valid)
        if group.start == layer:
            self.groups.append(group)
        return hidden

    def layer_kwargs(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Mask, rotary tables and position ids of the group that the layer works on."""
        if len(self.groups) == 1:
            if self.moved and kwargs.get("position_ids") is not None:
                # layers use them only to detect packed sequences, which gaps are not (flash attention)
                return {**kwargs, "position_ids": None}
            return kwargs
        group, kwargs, mask = self.groups[-1].to(hidden.device), dict(kwargs), kwargs.get("attention_mask")
        if not self.hide:
            kwargs["position_embeddings"] = _rows(kwargs["position_embeddings"], group.relative)
            kwargs["position_ids"] = None
        kind = layer_type(self.adapter, layer)
        if kind not in group.masks:
            group.masks[kind] = self._group_mask(layer, group, hidden, mask)
        kwargs["attention_mask"] = group.masks[kind]
        return kwargs

    def _group_mask(self, layer: int, group: Group, hidden: Tensor, mask: Any) -> Any:
        columns = torch.cat([self.past_columns(layer), group.valid], 1)
        if isinstance(mask, Tensor) and mask.dim() == 4:
            if self.hide:
                return self._hidden_mask(mask, columns, None)
            if not self.past:
                return gather_mask(mask, group.relative, group.valid)
        return build_mask(self.adapter, layer, hidden, columns, self.cache)

    # ------------------------------------------------------------------ shared pieces
    def _prepared_past(self, mask: Tensor) -> int:
        """Columns before the new tokens in a prepared mask: what is stored, perhaps fewer than the logical past."""
        return self.past if is_static(self.cache) else mask.shape[-1] - self.length

    def _apply(self, cut: Cut | None) -> Tensor:
        """(B, n) bool of the tokens that stay; remembers rewritten features and sizes."""
        ctx = self.ctx
        if cut is None:
            return ctx.visual | ctx.text
        keep = ctx.per_token(cut.keep, False)
        ctx.hidden = ctx.rewritten(cut)
        if cut.sizes is not None:
            ctx.sizes = cut.sizes
        return keep | ctx.text

    def _narrow(self, index: Tensor, valid: Tensor, hidden: Tensor) -> None:
        ctx = self.ctx
        ctx.text = gather(ctx.text, index) & valid
        ctx.item = torch.where(valid, gather(ctx.item, index), -1)
        ctx.slot = torch.where(valid, gather(ctx.slot, index), -1)
        ctx.hidden = hidden

    def _hide_from_context(self, keep: Tensor) -> None:
        self.ctx.item = torch.where(keep, self.ctx.item, -1)
        self.ctx.slot = torch.where(keep, self.ctx.slot, -1)

    def past_columns(self, layer: int) -> Tensor:
        """(B, past) validity of the columns before the new tokens, in the mask coordinates of the layer."""
        found = None
        if self.past:
            found = None if self.mask2d is None else self.mask2d[:, : self.past].bool()
            if self.state is not None and self.cache is not None:
                found = self.state.mask2d(self.cache, layer, 0, found)
        if found is None:
            return self.real.new_ones(self.real.shape[0], self.past)
        return found.to(self.real.device)

    @classmethod
    def _hidden_mask(cls, mask: Any, columns: Tensor, unprepared: Tensor | None) -> Any:
        """Hide ``columns`` (B, past + S) in a prepared mask; ``unprepared`` replaces a 2-D mask or none."""
        if isinstance(mask, dict):
            return {kind: cls._hidden_mask(m, columns, unprepared) for kind, m in mask.items()}
        if mask is None or mask.dim() == 2:
            return unprepared
        known = columns.shape[1]
        seen = torch.where(columns[:, None, None], mask[..., :known], hidden_value(mask))
        return torch.cat([seen, mask[..., known:]], -1)

    # ------------------------------------------------------------------ attention for reducers
    def wanted_rows(self, what: str) -> tuple[Tensor, Tensor]:
        """(B, R) query rows named ``what``, and which of them are real; padding repeats the last text token."""
        text, visual = self.ctx.text, self.ctx.visual
        last = text.shape[1] - 1 - text.flip(1).to(torch.int8).argmax(1, keepdim=True)
        if what == "last":
            return last, torch.ones_like(last, dtype=torch.bool)
        wanted = text
        if what == "all":
            wanted = text | visual
        elif what == "question":
            after = visual.flip(1).cumsum(1).flip(1) == 0
            wanted = text & after
            wanted = torch.where(wanted.any(1, keepdim=True), wanted, text)
        index, valid = compact(wanted)
        return torch.where(valid, index, last), valid

    def stored_columns(self, layer: int, new: int) -> int:
        """Keys that count in the attention of ``layer``, ``new`` of them its own; static caches hand out more."""
        if self.cache is None or layer >= len(self.cache.layers):
            return new
        return stored_length(self.cache, layer)  # holds the new keys already

    def reader(self, layer: int, what: str) -> att.Reader:
        """A tap that records the attention of ``layer`` in the context."""

        def read(module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> None:
            columns = self.stored_columns(layer, query.shape[2])
            if isinstance(mask, Tensor) and mask.dim() == 4:
                mask = mask[..., :columns]
            rows, valid = self.wanted_rows(what)
            found = att.attention_rows(module, query, key[:, :, :columns], mask, kwargs, rows)
            new = slice(columns - query.shape[2], columns)
            values = kwargs.get("value")
            values = None if values is None else values[:, :, new]
            self.ctx.attention[layer] = Attention(found[..., new], valid, values)

        return read

    def peek(self, layer: int, module: nn.Module, kwargs: dict[str, Any], what: str) -> Attention:
        """Attention rows of the coming layer on the present hidden states."""
        hidden = self.ctx.hidden
        kwargs = self.layer_kwargs(layer, hidden, kwargs)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 4 and self.past:
            mask = mask[..., -hidden.shape[1] :]
        rows, valid = self.wanted_rows(what)
        normed = getattr(module, self.adapter.attention_norm)(hidden)
        block = self.adapter.attention(module)
        return Attention(att.peek(block, normed, kwargs["position_embeddings"], rows, mask), valid)

    @torch.no_grad()
    def rerun(self, layer: int, module: nn.Module, kwargs: dict[str, Any], keep: Tensor) -> Tensor:
        """States (B, S, D) that the coming layer makes of the tokens ``keep`` (B, S) alone, earlier turns left out."""
        kwargs = dict(self.layer_kwargs(layer, self.ctx.hidden, kwargs))
        index, valid = compact(keep)
        hidden = gather(self.ctx.hidden, index)
        mask = build_mask(self.adapter, layer, hidden, valid, None)
        kwargs.update(position_embeddings=_rows(kwargs["position_embeddings"], index), position_ids=None)
        kwargs.update(attention_mask=mask, past_key_values=None)
        linear = "linear" in layer_type(self.adapter, layer)
        self.aside = True
        try:
            with contextlib.nullcontext() if linear else att.untapped(self.adapter.attention(module)):
                output = module.forward(hidden, **kwargs)  # not called: hooks and checkpointing belong to the real run
        finally:
            self.aside = False
        return restore(output[0] if isinstance(output, tuple) else output, keep)

    def prepare_context(self, layer: int, hidden: Tensor, module: nn.Module, kwargs: dict[str, Any]) -> VisualContext:
        """The context as it stands before decoder layer ``layer``."""
        ctx, device = self.ctx, hidden.device
        if ctx.item.device != device:
            for name in ("item", "slot", "text", "view", "tokens", "newline"):
                setattr(ctx, name, getattr(ctx, name).to(device))
        ctx.hidden, ctx.layer = hidden, layer
        ctx.peek = functools.partial(self.peek, layer, module, kwargs)
        ctx.rerun = functools.partial(self.rerun, layer, module, kwargs)
        return ctx

    # ------------------------------------------------------------------ after the language model
    @property
    def shortened(self) -> bool:
        """Whether any layer worked on fewer rows than the caller passed."""
        return self.moved or (len(self.groups) > 1 and not self.hide)

    def finish(self, output: Any) -> Any:
        """Restore outward shapes and tell the cache what it holds."""
        cache = output.past_key_values
        if cache is not None and (self.shortened or self.hide or self.state is not None):
            self._remember(cache)
        if self.shortened:
            group = self.groups[-1]
            kept = torch.zeros(self.real.shape, dtype=torch.long, device=group.index.device)
            kept.scatter_add_(1, group.index, group.valid.long())
            output.last_hidden_state = restore(output.last_hidden_state, kept > 0)
        return output

    def _remember(self, cache: Cache) -> None:
        old = self.state
        stored: list[Tensor] = []
        places: list[Tensor] = []
        known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for layer in range(len(cache.layers)):
            group = [g for g in self.groups if g.start <= layer][-1]
            key = (group.start, id(old.stored[layer]) if old is not None else 0)
            if key not in known:
                known[key] = self._columns(cache, layer, group)
            stored.append(known[key][0])
            places.append(known[key][1])
            if not self.hide:
                make_virtual(cache, layer, self.length - group.index.shape[1])
        shift = self.real.sum(1) - self.groups[0].valid.sum(1) if self.renumbered else None
        if shift is not None and old is not None and old.shift is not None:
            shift = shift + old.shift
        CacheState(cache, stored, places, shift)

    def _columns(self, cache: Cache, layer: int, group: Group) -> tuple[Tensor, Tensor]:
        """Validity and original place of every column that the layer holds now."""
        valid, place = [group.valid], [group.index + self.past]
        if self.past:
            old = self.state
            have = stored_length(cache, layer) - group.index.shape[1]  # columns before this call
            before = old.stored[layer][:, :have] if old is not None else group.valid[:, :0]
            where = old.places[layer][:, :have] if old is not None else group.index[:, :0]
            tail = have - before.shape[1]
            if self.mask2d is None:
                text = before.new_ones(before.shape[0], tail)
            else:
                text = self.mask2d[:, self.past - tail : self.past].bool()
            between = torch.arange(self.past - tail, self.past, device=group.index.device).expand(text.shape)
            valid, place = [before, text, *valid], [where, between, *place]
        return torch.cat(valid, 1), torch.cat(place, 1)
