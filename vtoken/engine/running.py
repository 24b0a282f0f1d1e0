# SPDX-License-Identifier: Apache-2.0
"""The language model of a wrapped model: a prefill is cut before and between its layers, a step gets its masks.

These are the hooks on the language model and its layers. What they find out they leave in the call's `Forward`.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtoken import compat
from vtoken.context import Cut
from vtoken.engine import cache as kv
from vtoken.engine import masks, outputs
from vtoken.engine.forward import Forward
from vtoken.engine.group import rows_left
from vtoken.engine.opening import COMPILED, needs_nothing
from vtoken.engine.positions import gone_on
from vtoken.engine.prefill import Prefill
from vtoken.engine.prompt import Prompt, behind_labels, behind_length, place
from vtoken.engine.reading import reader
from vtoken.engine.steps import step_kwargs
from vtoken.engine.taps import tap
from vtoken.stats import Stats

if TYPE_CHECKING:
    from vtoken.engine.session import Session


class Running:
    """The hooks of one session on the language model."""

    def __init__(self, session: Session) -> None:
        self.session, self.adapter, self.work = session, session.adapter, session.work
        self._watching: list[Any] = []  # handles; changed by `watch_layers` only

    def watch_layers(self, needed: bool) -> None:
        """Hook the decoder layers, or leave them alone: unpruned passes and most decode steps need nothing there."""
        if needed and not self._watching:
            self._watching = [
                layer.register_forward_pre_hook(
                    compat.hook(functools.partial(self.layer_pre, i)), with_kwargs=True, prepend=True
                )
                for i, layer in enumerate(self.adapter.layers)
            ]
        elif not needed and self._watching:
            for handle in self._watching:
                handle.remove()
            self._watching = []

    def rows(self) -> tuple[Tensor, Tensor] | None:
        """See `AdapterHooks.rows`."""
        prefill = self.session.prefill
        if prefill is None or len(prefill.groups) == 1:
            return None
        return prefill.group.relative, prefill.group.valid

    def places(self) -> tuple[Tensor, int] | None:
        """See `AdapterHooks.places`."""
        prefill = self.session.prefill
        if prefill is None:
            return None
        return prefill.group.index + prefill.past, prefill.past

    # ------------------------------------------------------------------ before the language model
    def language_pre(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Begins a prefill, or lets a step go on where compact position ids ended."""
        if torch.compiler.is_compiling():
            cache, embeds = kwargs.get("past_key_values"), kwargs.get("inputs_embeds")
            if self.work.idle and kv.pruned_of(cache) is None:
                return None
            placed = kwargs.get("position_ids") is not None
            if cache is not None and embeds is not None and embeds.shape[1] == 1 and placed and needs_nothing(cache):
                return None  # a decode step
        return self._language_pre(args, kwargs)

    @torch.compiler.disable(reason=COMPILED)
    def _language_pre(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        forward = self.session.forward
        if self.adapter.outer is None or forward is None or not forward.entered:
            kwargs = self.session.opening.bare_pre(kwargs)  # a model without an outer module, or past it
        forward = self.session.forward
        if forward is None or forward.kinds is None or not forward.records:
            pruned = kv.pruned_of(kwargs.get("past_key_values"))
            own = pruned is not None and (self.work.slides or not pruned.uniform or pruned.worth is not None)
            self.watch_layers(own)
            return args, gone_on(kwargs)
        return args, self._begin(forward, kwargs)

    def _begin(self, forward: Forward, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A pass that brings new visual tokens: find out whose token is what, and make the first cut."""
        session, started = self.session, time.perf_counter()
        embeds, mask, cache = kwargs["inputs_embeds"], kwargs.get("attention_mask"), kwargs.get("past_key_values")
        past = kv.logical_length(cache)
        real = masks.real_tokens(mask, embeds, past, cache)
        if self.work.idle and kv.pruned_of(cache) is None:
            session.report(functools.partial(self._whole, forward.kinds, forward.records, real, forward.asked))
            self.watch_layers(False)
            return kwargs
        prompt = self._prompt(forward, kwargs, real, past)
        visibility = masks.Visibility(self.adapter, kwargs, cache, real, prompt.document, past)
        hide = session.backend == "mask"
        shown = self.adapter.shown(kwargs)
        repairs = session.reducer.repair
        prefill = Prefill(self.adapter, prompt, visibility, shown, session.reducer.newlines, hide, repairs)
        forward.prefill = prefill  # the layers' hooks act from here on
        ctx = prefill.context
        stats = Stats(ctx.tokens, prompt.placed.row, self.work.depth, forward.asked, str(session.reducer))
        session.report(stats)
        if session.reader.cutter is not None:
            stats.from_tower = ctx.valid.sum(1)
            stats.patches = _sum(record.patches for record in forward.records.values())
        cut = session.first_cut(ctx)
        if cut is None and session.reader.cutter is not None:
            cut = Cut(ctx.valid)  # without the tokens that the vision tower dropped
        kwargs = prefill.cut_inputs(cut, kwargs, session.positions)
        stats.add_group(0, prefill.left, cut)
        self._prepare_layers(forward, prefill, kwargs)
        stats.light = dict(self.work.light)
        stats.selection_seconds += time.perf_counter() - started
        return kwargs

    def _prompt(self, forward: Forward, kwargs: dict[str, Any], real: Tensor, past: int) -> Prompt:
        """Items, documents, and where each prompt ends."""
        assert forward.kinds is not None
        placed = place(self.adapter, forward.kinds, forward.records, real, self.session.reader.reads)
        cache, language = kwargs.get("past_key_values"), self.adapter.language_model
        fills = kwargs.get("use_cache")
        fills = getattr(language.config, "use_cache", False) if fills is None else fills
        document = masks.documents_of(
            kwargs.get("attention_mask"),
            kwargs.get("position_ids"),
            kwargs.get("cu_seq_lens_q"),
            cache,
            cache is not None or bool(fills),
            real,
            masks.is_flash(self.adapter),
        )
        generation = self.session.opening.generations.now
        behind = None if generation is None else behind_length(generation.length, past, real)
        if behind is None:
            behind = behind_labels(forward.labels, placed, real, document)
        return Prompt.of(placed, real, document, behind)

    def _prepare_layers(self, forward: Forward, prefill: Prefill, kwargs: dict[str, Any]) -> None:
        self.watch_layers(prefill.moved or bool(self.work.layers) or prefill.counts is not None)
        for layer, rows in self.work.taps.items():
            compat.check_checkpointing(self.adapter.layers[layer], "decoder")
            block = self.adapter.attention(self.adapter.layers[layer])
            store = functools.partial(prefill.record, layer)
            look = functools.partial(prefill.looked_at, layer)
            forward.taps.enter_context(tap(block, reader(look, rows, store)))
        self.session.light.open(forward.taps, prefill)

    def _whole(self, kinds: Any, records: Any, real: Tensor, asked: dict[str, Tensor]) -> Stats:
        """Statistics of a prefill that nothing was dropped from."""
        placed = place(self.adapter, kinds, records, real)
        stats = Stats(placed.table.tokens, placed.row, self.work.depth, asked, str(self.session.reducer))
        stats.add_group(0, placed.valid, None)
        return stats

    # ------------------------------------------------------------------ decoder layers
    def layer_pre(self, index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Cuts a prefill before this layer, or gives a step the mask of what this layer holds."""
        forward = self.session.forward
        if forward is not None and forward.prefill is not None:
            return self._prefill_layer(index, module, args, kwargs, forward.prefill)
        return step_kwargs(self.adapter, self.work.kinds[index], index, args, kwargs, forward)

    @torch.compiler.disable(reason=COMPILED)
    def _prefill_layer(self, index: int, module: nn.Module, args: tuple, kwargs: dict, prefill: Prefill) -> Any:
        if not args:
            raise NotImplementedError(
                f"{type(module).__name__} is given its hidden states by name and not as the first argument, in which "
                f"vtoken cuts them: {compat.way_out()}."
            )
        hidden, restored = side_by_side(args[0], prefill.group.index.shape)
        if index in self.work.layers and prefill.has_visual:
            compat.check_checkpointing(module, "decoder")
            started = time.perf_counter()
            ctx = prefill.show(index, hidden, module, kwargs)
            cut = self.session.decide(self.session.reducer.at_layer, index, ctx)
            hidden = prefill.cut_layer(index, hidden, cut)
            stats: Any = self.session.stats
            stats.add_group(index, prefill.left, cut)
            stats.selection_seconds += time.perf_counter() - started
        rest = list(args[1:]) if prefill.hide else [rows_left(value, prefill.groups) for value in args[1:]]
        kwargs = prefill.layer_kwargs(index, hidden, kwargs)
        return (restored(hidden), *rest), kwargs

    # ------------------------------------------------------------------ after the language model
    def language_post(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Restores what a prefill made shorter; called after an error too, then without an output."""
        return None if self.session.forward is None else self._close(output)

    @torch.compiler.disable(reason=COMPILED)
    def _close(self, output: Any) -> Any:
        forward = self.session.forward
        if forward is None or forward.thread != threading.get_ident():
            return None  # this thread was refused
        prefill = forward.prefill
        try:
            if prefill is None or output is None:
                return None
            if self.work.depth in self.work.layers:
                self._look_behind(prefill, output)
            return outputs.finish(prefill, output)
        finally:
            self.session.release(forward)

    def _look_behind(self, prefill: Prefill, output: Any) -> None:
        """Show the reducer what the last layer made, of which nothing can be dropped any more."""
        ctx = prefill.show(self.work.depth, output.last_hidden_state, None, {})
        if self.session.decide(self.session.reducer.at_layer, self.work.depth, ctx) is not None:
            raise ValueError(
                f"Reducer {self.session.reducer.name!r} drops tokens behind the last layer, where nothing gets "
                f"cheaper any more: return None at layer {self.work.depth}."
            )


def side_by_side(states: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """States of several residual streams, (A, B, n, D) or (B, n, A, D), as (B, n, A * D); and the way back.

    Parameters
    ----------
    shape : tuple of int
        (B, n).
    """
    if states.dim() == 3:
        return states, lambda hidden: hidden
    if states.shape[:2] == shape:
        count = states.shape[2]
        return states.flatten(2), lambda hidden: hidden.unflatten(2, (count, -1))
    count = states.shape[0]
    return states.permute(1, 2, 0, 3).flatten(2), lambda hidden: hidden.unflatten(2, (count, -1)).permute(2, 0, 1, 3)


def _sum(pairs: Iterable[tuple[int, int] | None]) -> tuple[int, int] | None:
    """Pairs of numbers, added up; None where there are none."""
    known = [pair for pair in pairs if pair is not None]
    return (sum(every for every, _ in known), sum(some for _, some in known)) if known else None
