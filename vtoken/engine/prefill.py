# SPDX-License-Identifier: Apache-2.0
"""One pruned prefill: the groups of decoder layers, and the rows that each of them works on.

A prefill is a list of *groups*: from layer ``start`` on, the sequence consists of the tokens ``index``, compacted to
the right (left padding). Masks, rotary tables and position ids of a layer are taken from its group. What a reducer is
shown is a value made from the group at work; its answer makes the next group. This file must not know hooks, and leaves
who sees whom to `vtoken.engine.masks` and what is stored to `vtoken.engine.cache`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtoken.context import Attention, Cut, VisualContext
from vtoken.engine import cache as kv
from vtoken.engine import repair
from vtoken.engine.group import Group, rows_left
from vtoken.engine.masks import Visibility, check_flash_window, layer_type
from vtoken.engine.positions import given_or_counted, renumbered, shift_of
from vtoken.engine.prompt import Prompt, View
from vtoken.engine.reading import Coming, table_rows
from vtoken.ops.ragged import compact, gather

if TYPE_CHECKING:
    from vtoken.adapters.base import Adapter


_OWN = ("attention_mask", "position_embeddings", "position_ids", "past_key_values")
"""Arguments of a layer that `Prefill.layer_kwargs` treats each in its own way."""


class Prefill:
    """The state of one forward pass that brings new visual tokens.

    Parameters
    ----------
    adapter : Adapter
        Where things are in the model.
    prompt : Prompt
        Whose token is what.
    visibility : Visibility
        Who may see whom.
    embeds : Tensor
        (B, S, D): what the language model was called with.
    newlines : str
        See `vtoken.Reducer.newlines`.
    hide : bool
        True hides tokens by masks instead of dropping them (the oracle of the tests).
    repairs : bool
        Whether kept tokens weigh as much as those that they stand for, see `vtoken.engine.repair`.
    """

    def __init__(
        self,
        adapter: Adapter,
        prompt: Prompt,
        visibility: Visibility,
        embeds: Tensor,
        newlines: str,
        hide: bool,
        repairs: bool = False,
    ) -> None:
        self.adapter, self.prompt, self.visibility, self.hide = adapter, prompt, visibility, hide
        self.past, self.length = visibility.past, prompt.real.shape[1]
        # the first two are set once, with the arguments of the language model; the last inside of `aside` only
        self.moved = self.renumbered = self.is_aside = False
        first = Group.whole(prompt)
        self.groups: tuple[Group, ...] = (first,)
        self.context = prompt.context(embeds, first.view, adapter, newlines)
        self.left = self.context.valid  # (I, N) bool: tokens of the items that are left; changed by `_advance`
        self.counts = self.left.float() if repairs else None  # (I, N): tokens each one stands for; as `left`
        self.places = (
            first.index
        )  # (B, n) positions, of several axes that of time; set with the language model's arguments
        self._shown = first  # the group whose context is at hand
        self.masks: dict[tuple[int, str], Any] = {}  # by group and kind of layer: a memo, never read for anything else

    @property
    def group(self) -> Group:
        """The sequence that the next layer works on."""
        return self.groups[-1]

    # ------------------------------------------------------------------ before the language model
    def cut_inputs(self, cut: Cut | None, kwargs: dict[str, Any], positions: str) -> dict[str, Any]:
        """Apply the cut before the language model to its keyword arguments."""
        group, full = self.group, kwargs["inputs_embeds"]
        given = kwargs.get("position_ids")
        keep = group.valid
        if cut is not None:
            keep = group.stays(self.context.kept(cut))
            if cut.features is not None:
                kwargs = self.adapter.with_shown(kwargs, group.rewritten(self.adapter.shown(kwargs), cut))
            self._advance(cut)
        nothing = cut is None or torch.equal(keep, group.valid)
        if not nothing:
            check_flash_window(self.adapter, 0, self.past + self.length)
        if not nothing and self.hide:
            kwargs = {**kwargs, "attention_mask": self.visibility.after_hiding(keep, full)}
            hiding = group.hiding(0, keep, self.prompt)
            self.groups = (hiding.weighing(self.counts),)  # no layer has run: the first group is replaced
        elif not nothing:
            kwargs = self._drop(keep, kwargs, full)
        elif kv.pruned_of(self.visibility.cache) is not None and not isinstance(kwargs.get("attention_mask"), Mapping):
            kwargs = {**kwargs, "attention_mask": self.visibility.columns(0, group.valid)}
        shift = shift_of(self.visibility.cache)
        if positions == "compact" and not self.hide and (not nothing or shift is not None):
            self.renumbered = True  # before the language model sees the new ids
            kwargs = {**kwargs, "position_ids": renumbered(self.prompt, self.group.valid, given, self.past, shift)}
        self._show(None)
        if self.counts is not None:
            ids = given_or_counted(kwargs.get("position_ids"), self.past, self.length, full.device)
            self.places = (ids[-3] if ids.dim() == 3 else ids).expand(self.group.index.shape)
        return kwargs

    def _drop(self, keep: Tensor, kwargs: dict[str, Any], full: Tensor) -> dict[str, Any]:
        # A row may be cut although the tensor does not shrink (its longest row has no image): it is re-aligned too.
        index, valid = compact(keep)
        self.moved = True
        taken = self.group.taken(0, index, valid, self.prompt, first=True)
        self.groups = (taken.weighing(self.counts),)  # no layer has run: replaced
        position_ids = given_or_counted(kwargs.get("position_ids"), self.past, self.length, index.device)
        embeds = gather(kwargs["inputs_embeds"], index)
        return {
            **self.adapter.cut_extras(kwargs, index, valid),
            "inputs_embeds": embeds,
            "position_ids": gather(position_ids, index, dim=position_ids.dim() - 1, batch=position_ids.dim() - 2),
            "attention_mask": self.visibility.after_drop(index, valid, full, embeds),
            **self.visibility.varlen(index, valid),
        }

    # ------------------------------------------------------------------ at a decoder layer
    def show(self, layer: int, hidden: Tensor, module: nn.Module | None, kwargs: dict[str, Any]) -> VisualContext:
        """The context as it stands before decoder layer ``layer``, or behind the last one."""
        group = self.group.to(hidden.device)
        self._show(hidden)
        ctx = self.context.same_tokens(layer=layer)
        if module is not None:
            kwargs = self.layer_kwargs(layer, hidden, kwargs)
            documents = self.prompt.documents_of(group.index)
            coming = Coming(self.adapter, layer, module, kwargs, hidden, group.view, documents, self.aside)
            ctx = ctx.same_tokens(peek=functools.partial(coming.peek, ctx), rerun=coming.rerun)
        return ctx

    def cut_layer(self, layer: int, hidden: Tensor, cut: Cut | None) -> Tensor:
        """Apply a cut before decoder layer ``layer``; returns the hidden states it works on."""
        if cut is None:
            self._show(None)
            return hidden
        group = self.group.to(hidden.device)
        keep = group.stays(self.context.kept(cut))
        hidden = group.rewritten(hidden, cut)
        self._advance(cut)
        if torch.equal(keep, group.valid):
            self._show(None)  # the states of a layer are not kept alive by a context
            return hidden
        check_flash_window(self.adapter, layer, self.past + self.length)
        if self.hide:
            group = group.hiding(layer, keep, self.prompt)
        else:
            index, valid = compact(keep)
            hidden = gather(hidden, index)
            group = group.taken(layer, index, valid, self.prompt)
        self.groups = (
            *self.groups,
            group.weighing(self.counts),
        )  # layers before this one have run on the earlier groups
        self._show(None)
        return hidden

    def _advance(self, cut: Cut) -> None:
        """The reducer's context after its answer, apart from the sequence, which `_show` takes from the group."""
        if self.counts is not None:
            self.counts = repair.stands_for(self.context, cut, self.counts)
        self.left = self.left.to(cut.keep.device) & self.context.kept(cut)
        notes = {**self.context.notes, **cut.notes}
        sizes = self.context.sizes if cut.sizes is None else cut.sizes
        self.context = self.context.same_tokens(sizes=sizes, notes=notes)

    def _show(self, hidden: Tensor | None) -> None:
        """The context of the group at work; without ``hidden`` states, as nobody asks for them before a layer does."""
        device = self.context.item.device if hidden is None else hidden.device
        group = self.group.to(device)
        blank = torch.empty(*group.view.valid.shape, 0, dtype=torch.float32, device=device)
        states = blank if hidden is None else group.view.take(hidden)
        if self._shown is self.group and device == self.context.item.device:
            self.context = self.context.same_tokens(hidden=states)
        else:
            item, slot, text = group.shown
            self.context = replace(self.context, hidden=states, item=item, slot=slot, text=text)
            self._shown = self.group  # the context is of this group from here on

    @property
    def has_visual(self) -> bool:
        """Whether anything is left that can be dropped."""
        return bool(self.context.visual.any())

    def looked_at(self, layer: int, new: int) -> tuple[VisualContext, View, Tensor | None, int]:
        """What a reader of layer ``layer`` is told, which works on ``new`` tokens."""
        group = self.group
        return self.context, group.view, self.prompt.documents_of(group.index), self.stored_columns(layer, new)

    def record(self, layer: int, attention: Attention) -> None:
        """Remember attention rows of a layer that ran, for the contexts to come."""
        self.context = self.context.same_tokens(attention={**self.context.attention, layer: attention})

    def layer_kwargs(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Mask, rotary tables and position ids of the group that the layer works on."""
        kwargs = self._own_kwargs(layer, hidden, kwargs)
        if self.group.worth is None or not self.adapter.has_attention(self.adapter.layers[layer]):
            return kwargs
        if (key := (len(self.groups), f"weighed {layer_type(self.adapter, layer)}")) not in self.masks:
            self.masks[key] = repair.weighed_prefill(self, layer, hidden, kwargs.get("attention_mask"))
        return {**kwargs, "attention_mask": self.masks[key]}

    def _own_kwargs(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        if len(self.groups) == 1:
            if self.moved and kwargs.get("position_ids") is not None and self.visibility.flash:
                # used to detect packed sequences, which gaps are not
                return {**kwargs, "position_ids": None}
            return kwargs
        group, given = self.group.to(hidden.device), kwargs.get("attention_mask")
        if not self.hide:
            kwargs = {name: value if name in _OWN else rows_left(value, self.groups) for name, value in kwargs.items()}
        kind = layer_type(self.adapter, layer)
        if (key := (len(self.groups), kind)) not in self.masks:
            self.masks[key] = self.visibility.of_layer(layer, given, group.valid, group.relative, hidden, self.hide)
        kwargs = {**kwargs, "attention_mask": self.masks[key]}
        if not self.hide:
            if "position_embeddings" in kwargs:
                kwargs["position_embeddings"] = table_rows(kwargs["position_embeddings"], None, group.relative)
            if (ids := kwargs.get("position_ids")) is not None:
                short = functools.partial(gather, dim=ids.dim() - 1, batch=ids.dim() - 2)
                kwargs["position_ids"] = None if self.visibility.flash else short(ids, group.relative)
            kwargs.update(self.visibility.varlen(group.index, group.valid))
        return kwargs

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """While open, a layer runs on other rows than those of the group at work."""
        self.is_aside = True
        try:
            yield
        finally:
            self.is_aside = False

    def stored_columns(self, layer: int, new: int) -> int:
        """Keys that count in the attention of ``layer``, ``new`` of them its own; static caches hand out more."""
        cache = self.visibility.cache
        if cache is None or layer >= len(cache.layers):
            return new
        return kv.stored_length(cache, layer)  # holds the new keys already

    @property
    def shortened(self) -> bool:
        """Whether any layer worked on fewer rows than the caller passed."""
        return self.moved or (len(self.groups) > 1 and not self.hide)

    def group_of(self, layer: int) -> Group:
        """The sequence that a layer worked on."""
        return [group for group in self.groups if group.start <= layer][-1]
