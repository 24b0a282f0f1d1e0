# SPDX-License-Identifier: Apache-2.0
"""Attaches a reducer to a model: hooks in, prefill cut, decode masks realigned, hooks out.

Contract: every shape visible from outside stays (logits, labels, ``generate``'s ids, masks and positions,
``cache.get_seq_length()``); only what the decoder computes and stores is shorter.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer

from vtoken import attention as att
from vtoken.adapters.base import MODALITIES, Adapter
from vtoken.cache import CacheState, is_static, logical_length, state_of
from vtoken.context import Cut, VisualContext
from vtoken.encoder import EncoderRead
from vtoken.light.decoder import LightDecoder
from vtoken.methods import replace_method
from vtoken.precision import without_autocast
from vtoken.prefill import Group, Prefill, build_mask, layer_type
from vtoken.reducers.base import Reducer
from vtoken.stats import Stats
from vtoken.tower import ITEM, VisionReader, VisionRecord, expand_items

TWO_THREADS = (
    "Two threads are running one wrapped model at the same time: give each thread its own copy, "
    "or guard the calls with a lock."
)


class _Forward:
    """One forward pass of the outer module: a decode step (``kinds`` is None) or a prefill with new visual tokens."""

    def __init__(self, cache: Any, kinds: Tensor | None = None, mask2d: Tensor | None = None) -> None:
        self.cache, self.state = cache, state_of(cache)
        self.kinds, self.mask2d = kinds, mask2d
        self.records: dict[str, VisionRecord] = {}
        self.prefill: Prefill | None = None
        self.taps = contextlib.ExitStack()
        self.masks: dict[Any, Any] = {}

    def renumbered(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the language model in a decode step: its position ids go on where compact ones ended."""
        if self.state is None or self.state.shift is None:
            return kwargs
        position_ids, embeds = kwargs.get("position_ids"), kwargs.get("inputs_embeds")
        given = kwargs["input_ids"] if embeds is None else embeds
        if position_ids is None:
            past = logical_length(self.cache)
            position_ids = torch.arange(past, past + given.shape[1], device=given.device)[None]
        return {**kwargs, "position_ids": position_ids - self.state.shift[:, None].to(position_ids.device)}


class Session:
    """A reducer at work on one model.

    Parameters
    ----------
    adapter : Adapter
        Where things are in the model.
    reducer : Reducer
        What to do.
    positions : str
        ``"keep"`` the original position ids of kept tokens, or ``"compact"``: renumber them.
    backend : str
        ``"drop"``, or ``"mask"``: the same result by hiding tokens instead of dropping them (slow; a reference).
    """

    def __init__(self, adapter: Adapter, reducer: Reducer, positions: str, backend: str) -> None:
        self.adapter, self.reducer, self.positions, self.backend = adapter, reducer, positions, backend
        depth = len(adapter.layers)
        self._kinds = [layer_type(adapter, layer) for layer in range(depth)]
        self._sliding = "sliding_attention" in self._kinds
        if backend == "mask" and any("linear" in kind for kind in self._kinds):
            raise NotImplementedError(
                "backend='mask' is not defined for a decoder with recurrent layers, which see a hidden token all the "
                "same: use backend='drop'."
            )
        self._idle = reducer.is_identity
        active = not self._idle
        self.layers = frozenset(reducer.layers(depth)) if active else frozenset()
        self.taps = reducer.taps(depth) if active else {}
        reads, projector = (reducer.encoder_reads(), reducer.needs_projector) if active else ((), False)
        self.reader = VisionReader(adapter, reads, projector, reducer.cutter, reducer.resampler)
        light = reducer.light_layers(depth) if active else {}
        for layer in {*self.layers, *self.taps, *light}:
            if not 0 <= layer < depth:
                raise ValueError(f"Reducer {reducer.name!r} wants layer {layer}, but the decoder has {depth} layers.")
        for layer in self.taps:
            if not adapter.has_attention(adapter.layers[layer]):
                raise NotImplementedError(
                    f"Reducer {reducer.name!r} reads the attention of decoder layer {layer}, which is recurrent: "
                    "choose a layer that attends, or a reducer that reads no attention."
                )
        self.light = LightDecoder(adapter, light, self.taps)
        self._stats: Stats | Callable[[], Stats] | None = None
        self._forward: _Forward | None = None
        self._owner: int | None = None  # the thread whose forward pass is under way
        self._claim = threading.Lock()
        self._announced: tuple[Tensor, VisionRecord] | None = None
        self._handles: list[Any] = []
        self._layer_handles: list[Any] = []
        self._undo: list[Callable[[], None]] = []

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "A wrapped model cannot be pickled, as its hooks belong to this process: unwrap it before and wrap the "
            "loaded one, copy it with copy.deepcopy, or use save_pretrained."
        )

    # ------------------------------------------------------------------ attach and detach
    def attach(self) -> None:
        """Install all hooks and instance-level wraps."""
        adapter = self.adapter
        try:
            if adapter.outer is not None:
                self._before(adapter.outer, self._outer_pre)
                for modality in MODALITIES:
                    if hasattr(adapter.outer, name := f"get_{modality}_features"):
                        self.wrap_method(adapter.outer, name, functools.partial(self._reading, modality))
            self._before(adapter.language_model, self._language_pre)
            after = adapter.language_model.register_forward_hook(
                self._language_post, with_kwargs=True, always_call=True
            )
            self._handles.append(after)
            self._handles += self.light.attach(lambda: None if self._forward is None else self._forward.prefill)
            self.wrap_method(
                adapter.generator, "create_masks_for_generate", self._static_masks, create_masks_for_generate
            )
            adapter.install(self)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Remove every trace."""
        self._watch_layers(False)
        for handle in self._handles:
            handle.remove()
        for undo in reversed(self._undo):
            undo()
        self._handles.clear()
        self._undo.clear()

    def _before(self, module: nn.Module, hook: Callable) -> None:
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _watch_layers(self, needed: bool) -> None:
        """Hook the decoder layers, or leave them alone: unpruned passes and most decode steps need nothing there."""
        if needed and not self._layer_handles:
            self._layer_handles = [
                layer.register_forward_pre_hook(functools.partial(self._layer_pre, i), with_kwargs=True, prepend=True)
                for i, layer in enumerate(self.adapter.layers)
            ]
        elif not needed and self._layer_handles:
            for handle in self._layer_handles:
                handle.remove()
            self._layer_handles.clear()

    def wrap_method(self, owner: Any, name: str, make: Callable[[Callable], Callable], default: Any = None) -> None:
        """Replace a method on one instance until `detach`; ``make(original)`` returns the replacement."""
        self._undo.append(replace_method(owner, name, make, default))

    @property
    def group(self) -> Group | None:
        """The sequence that the decoder layers work on since a cut inside of the decoder, None without one."""
        prefill = None if self._forward is None else self._forward.prefill
        return None if prefill is None or len(prefill.groups) == 1 else prefill.groups[-1]

    @property
    def stats(self) -> Stats | None:
        """Of the last prefill; where nothing was reduced they are counted when somebody asks."""
        if callable(self._stats):
            self._stats = self._stats()
        return self._stats

    # ------------------------------------------------------------------ vision side
    def _reading(self, modality: str, original: Callable) -> Callable:
        def read(*args: Any, **kwargs: Any) -> Any:
            if self.reader.busy and self.reader.thread != threading.get_ident():
                raise RuntimeError(TWO_THREADS)
            if self.reader.busy:
                return original(*args, **kwargs)
            output, record = self.reader(original, modality, *args, **kwargs)
            if self._forward is not None and self._owner == threading.get_ident():
                self._forward.records[modality] = record
            return output

        return read

    def _static_masks(self, original: Callable) -> Callable:
        """Static caches: generate() prepares 4-D masks before calling forward."""

        def make(*args: Any, attention_mask=None, past_key_values=None, inputs_embeds=None, **kwargs: Any) -> Any:
            if (state := state_of(past_key_values)) is not None:
                attention_mask = state.mask2d(past_key_values, 0, inputs_embeds.shape[1], attention_mask)
            return original(
                *args,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )

        return make

    # ------------------------------------------------------------------ outer module: is this a prefill?
    def _outer_pre(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():  # a compiled decoding step on a static cache needs nothing here
            cache = kwargs.get("past_key_values")
            keys = (*self.adapter.pixel_keys, "mm_encoder_outputs")
            compact = (state := state_of(cache)) is not None and state.shift is not None
            nothing_new = not any(kwargs.get(key) is not None for key in keys)
            if nothing_new and not compact and (cache is None or is_static(cache)):
                return None
        return self._open_forward(module, args, kwargs)

    @torch.compiler.disable
    def _open_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        self._own()
        call = kwargs
        if args:  # reading a signature takes as long as a few decoder layers' hooks
            bound = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
            call = {**bound, **bound.get("kwargs", {})}
        self._forward = None
        cache: Any = call.get("past_key_values")
        encoded = call.get("mm_encoder_outputs") or {}
        given = call["input_ids"] if call.get("input_ids") is not None else call.get("inputs_embeds")
        if given is None:
            return None  # the model raises its own error
        if given.shape[0] == 0 or given.shape[1] == 0:
            raise ValueError(f"The batch is empty (input of shape {tuple(given.shape)}): pass at least one token.")
        state = state_of(cache)
        self._check_cache(cache, state, given)
        if state is not None and given.shape[1] > 1:
            self._check_window(cache, logical_length(cache) + given.shape[1])
        pixels = any(call.get(key) is not None for key in self.adapter.pixel_keys)
        if pixels or any(output is not None for output in encoded.values()):
            if any(
                getattr(output, "last_hidden_state", 0) is None for output in encoded.values() if output is not None
            ):
                raise NotImplementedError(
                    "prefill_chunk_size may split an image between chunks, which vtoken does not support: "
                    "remove it from the generation config."
                )
            self._open_prefill(call, cache, encoded)
            self._check_window(cache, 0)
        elif state is not None:
            mask = call.get("attention_mask")
            two = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
            self._forward = _Forward(cache, mask2d=two)
            if (mask is None or two is not None) and not is_static(cache):
                return args, {**kwargs, "attention_mask": state.mask2d(cache, 0, given.shape[1], mask)}
        return None

    def _own(self) -> None:
        """Claim the session for this thread until the language model has run."""
        with self._claim:
            me = threading.get_ident()
            if self._owner not in (None, me) and self._owner in {thread.ident for thread in threading.enumerate()}:
                raise RuntimeError(TWO_THREADS)
            self._owner = me

    @staticmethod
    def _check_cache(cache: Any, state: CacheState | None, given: Tensor) -> None:
        if state is None:
            return
        if state.rows != given.shape[0]:
            raise RuntimeError(
                f"The cache was pruned for a batch of {state.rows}, not {given.shape[0]}: start with a new cache."
            )
        if is_static(cache) and given.shape[1] > 1:
            raise NotImplementedError(
                "A pruned StaticCache cannot take a further prompt, it does not know its logical length: "
                "use a dynamic cache for several turns."
            )

    def _check_window(self, cache: Any, length: int) -> None:
        """Sliding windows are exact in a first prompt and in single steps, which know the original distances."""
        if self._idle or not self._sliding:
            return
        window = self.adapter.language_model.config.sliding_window
        if is_static(cache):
            length = max(layer.max_cache_len for layer in cache.layers)
        if length > window:
            raise NotImplementedError(
                f"This model attends in a sliding window of {window} tokens. Its meaning is kept in a first prompt "
                "with a dynamic cache, not in a StaticCache or a further prompt on a pruned cache beyond the window: "
                "use a dynamic cache, and a new one for each turn."
            )

    def _open_prefill(self, call: dict[str, Any], cache: Any, encoded: dict[str, Any]) -> None:
        kinds = self.adapter.modality(call.get("input_ids"), call.get("inputs_embeds"))
        if not bool((kinds > 0).any()):
            return
        self._forward = _Forward(cache, kinds)
        for modality, output in encoded.items():
            if output is not None and ITEM not in output:
                raise NotImplementedError(
                    "The visual features (mm_encoder_outputs) were computed before the model was wrapped: pass the "
                    "pixels to forward or generate instead, or encode with the wrapped model."
                )
            if output is not None:
                self._forward.records[modality] = output[ITEM]

    # ------------------------------------------------------------------ models without an outer module
    def announce(self, kinds: Tensor, record: VisionRecord) -> None:
        """The next ``inputs_embeds`` of the language model hold visual tokens at ``kinds`` (B, S) > 0."""
        self._announced = kinds, record

    def _open_bare(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        self._own()
        announced, self._announced = self._announced, None
        cache: Any = kwargs.get("past_key_values")
        embeds = kwargs.get("inputs_embeds")
        given = kwargs["input_ids"] if embeds is None else embeds
        state, self._forward = state_of(cache), None
        self._check_cache(cache, state, given)
        if announced is not None and embeds is not None and embeds.shape[1] == announced[0].shape[1]:
            kinds, record = announced
            self._forward = _Forward(cache, kinds.repeat_interleave(len(embeds) // len(kinds), 0))
            self._forward.records["image"] = record
        elif state is not None:
            mask = kwargs.get("attention_mask")
            two = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
            self._forward = _Forward(cache, mask2d=two)
            if (mask is None or two is not None) and not is_static(cache):
                return {**kwargs, "attention_mask": state.mask2d(cache, 0, given.shape[1], mask)}
        return kwargs

    # ------------------------------------------------------------------ language model
    @torch.compiler.disable
    def _language_pre(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.adapter.outer is None:
            kwargs = self._open_bare(kwargs)
        forward = self._forward
        if forward is None or forward.kinds is None:
            state = state_of(kwargs.get("past_key_values"))
            self._watch_layers(state is not None and (self._sliding or not state.uniform))
            return args, kwargs if forward is None else forward.renumbered(kwargs)
        started = time.perf_counter()
        embeds, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        past = logical_length(kwargs.get("past_key_values"))
        cache = kwargs.get("past_key_values")
        real = self._real_tokens(mask, embeds, past, cache)
        if self._idle and forward.state is None:
            blank = embeds.new_empty(*real.shape, 0)  # the states themselves would stay in memory until the next prompt
            self._stats = functools.partial(self._whole, forward.kinds, forward.records, blank, real)
            self._watch_layers(False)
            return args, kwargs
        ctx = self.context(forward.kinds, forward.records, embeds, real, kwargs.get("position_ids"))
        two = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        hide = self.backend == "mask"
        forward.prefill = prefill = Prefill(self.adapter, ctx, real, cache, forward.state, two, past, hide)
        self._stats = stats = Stats(ctx.tokens, ctx.row, len(self.adapter.layers))
        if self.reader.cutter is not None:
            stats.from_tower = ctx.valid.sum(1)
        cut = self.first_cut(ctx)
        if cut is None and self.reader.cutter is not None:
            cut = Cut(ctx.valid)  # without the tokens that the vision tower dropped
        kwargs = prefill.cut_inputs(cut, kwargs, self.positions)
        stats.add_group(0, ctx, cut)
        self._watch_layers(prefill.moved or bool(self.layers))
        for layer, rows in self.taps.items():
            block = self.adapter.attention(self.adapter.layers[layer])
            forward.taps.enter_context(att.tap(block, prefill.reader(layer, rows)))
        self.light.open(forward.taps, prefill)
        stats.light = self.light.layers
        stats.selection_seconds += time.perf_counter() - started
        return args, kwargs

    def _whole(self, *prompt: Any) -> Stats:
        """Statistics of a prefill that nothing was dropped from; ``prompt`` as `context` takes it."""
        ctx = self.context(*prompt)
        stats = Stats(ctx.tokens, ctx.row, len(self.adapter.layers))
        stats.add_group(0, ctx, None)
        return stats

    @staticmethod
    def _real_tokens(mask: Any, embeds: Tensor, past: int, cache: Any) -> Tensor:
        """(B, S) bool: new tokens that are not padding, from whatever mask the language model was given."""
        if isinstance(mask, dict):
            mask = mask.get("full_attention", next(iter(mask.values())))
        rows, length = embeds.shape[:2]
        if mask is None:
            return torch.ones(rows, length, dtype=torch.bool, device=embeds.device)
        if mask.dim() == 2:
            return mask[:, -length:].bool().expand(rows, -1).to(embeds.device)
        start = past if is_static(cache) else mask.shape[-1] - length
        last = mask[:, 0, -1, start : start + length]  # a prepared mask: what the last query sees
        return (last if last.dtype == torch.bool else last == 0).expand(rows, -1).to(embeds.device)

    def context(
        self,
        kinds: Tensor,
        records: Mapping[str, VisionRecord],
        embeds: Tensor,
        real: Tensor,
        position_ids: Tensor | None = None,
    ) -> VisualContext:
        """What a reducer sees of a prompt: its modalities (B, S), encoded items, embeddings and real tokens (B, S)."""
        kinds = torch.where(real, kinds.to(embeds.device), 0)
        for modality, code in MODALITIES.items():
            if modality not in records:  # a placeholder that no picture belongs to is text
                kinds = torch.where(kinds == code, 0, kinds)
        item, slot = (torch.full(kinds.shape, -1, device=embeds.device) for _ in range(2))
        layouts: list[Any] = []
        maps: dict[EncoderRead, list[Tensor]] = {read: [] for read in self.reader.reads}
        inputs: list[Tensor] = []
        resampled: list[Tensor] = []
        for modality, code in MODALITIES.items():
            here = kinds == code
            if (record := records.get(modality)) is None or not any(counts := here.sum(1).tolist()):
                continue
            times = max(sum(counts) // max(sum(record.lengths), 1), 1)  # beams repeat every row in a block
            record = self.adapter.regroup(record, here[::times])
            order = expand_items(record.lengths, counts)
            known = [x.to(embeds.device) for x in _numbered(len(layouts), [record.lengths[i] for i in order])]
            if record.dropped is not None:
                gone = torch.cat(_items(record.dropped, record, order, embeds.device))
                known = [torch.where(gone, -1, x) for x in known]
            places = here.nonzero(as_tuple=True)
            item[places], slot[places] = known
            layouts += [record.layouts[i] for i in order]
            for read, values in record.maps.items():
                maps[read] += _items(values, record, order, embeds.device)
            if record.projector_input is not None:
                inputs += _items(record.projector_input, record, order, embeds.device)
            resampled += [record.resampled[i].to(embeds.device) for i in order] if record.resampled else []
        return VisualContext(
            hidden=embeds,
            item=item,
            slot=slot,
            text=real & (kinds == 0),
            layouts=layouts,
            encoder={read: pad_sequence(parts, True, float("nan")) for read, parts in maps.items() if parts},
            position_ids=position_ids,
            projector_input=pad_sequence(inputs, True, float("nan")) if inputs else None,
            projector=self.adapter.token_projector if inputs else None,
            resampled=resampled,
            depth=len(self.adapter.layers),
            newlines=self.reducer.newlines,
        )

    def first_cut(self, ctx: VisualContext) -> Cut | None:
        """What the reducer does before the language model."""
        with without_autocast(ctx.hidden.device):
            return None if self._idle else self.reducer.before_llm(ctx)

    def _language_post(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        return None if self._owner is None else self._close_forward(output)

    @torch.compiler.disable
    def _close_forward(self, output: Any) -> Any:
        if self._owner != threading.get_ident():
            return None  # this thread was refused
        forward, self._forward, self._owner = self._forward, None, None
        if forward is None or forward.prefill is None:
            return None
        forward.taps.close()
        return None if output is None else forward.prefill.finish(output)  # no output: the forward raised

    # ------------------------------------------------------------------ decoder layers
    def _layer_pre(self, index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        forward = self._forward
        if forward is not None and forward.prefill is not None:
            return self._prefill_layer(index, module, args, kwargs, forward.prefill)
        state = state_of(kwargs.get("past_key_values"))
        if state is None:
            return None
        return self._decode_layer(index, args, kwargs, forward, state)

    def _decode_layer(
        self, index: int, args: tuple, kwargs: dict[str, Any], forward: _Forward | None, state: CacheState
    ) -> Any:
        """A layer that stores other columns than layer 0 needs a mask of its own."""
        cache: Any = kwargs["past_key_values"]
        if not hasattr(cache.layers[index], "get_seq_length"):
            return None
        query, kind = args[0].shape[1], self._kinds[index]
        sliding = kind == "sliding_attention" and not state.static_length and query == 1
        if state.same_as_first[index] and not sliding:
            return None
        memo = {} if forward is None else forward.masks
        key = (id(state.stored[index]), kind)
        given = kwargs.get("attention_mask")
        prepared = isinstance(given, Tensor) or (given is None and state.full[index])
        if key not in memo and query == 1 and kind == "full_attention" and prepared and not state.static_length:
            memo[key] = None if given is None else state.step_mask(cache, index, given)
        elif key not in memo:
            window = self.adapter.language_model.config.sliding_window if sliding else None
            mask = state.mask2d(cache, index, query, None if forward is None else forward.mask2d, window)
            if mask is None and given is None:
                memo[key] = None
            else:
                memo[key] = build_mask(self.adapter, index, args[0], mask, cache)
        return None if memo[key] is given else (args, {**kwargs, "attention_mask": memo[key]})

    @torch.compiler.disable
    def _prefill_layer(self, index: int, module: nn.Module, args: tuple, kwargs: dict, prefill: Prefill) -> Any:
        hidden = args[0]
        if index in self.layers and bool(prefill.ctx.visual.any()):
            self._check_checkpointing(module)
            started = time.perf_counter()
            ctx = prefill.prepare_context(index, hidden, module, kwargs)
            with without_autocast(hidden.device):
                cut = self.reducer.at_layer(index, ctx)
            hidden = prefill.cut_layer(index, hidden, cut)
            self.stats.add_group(index, ctx, cut)  # type: ignore[union-attr]
            self.stats.selection_seconds += time.perf_counter() - started  # type: ignore[union-attr]
        return (hidden, *args[1:]), prefill.layer_kwargs(index, hidden, kwargs)

    @staticmethod
    def _check_checkpointing(module: nn.Module) -> None:
        checkpointing = module.training and getattr(module, "gradient_checkpointing", False)
        if checkpointing and "__call__" in vars(GradientCheckpointingLayer):
            raise NotImplementedError(
                "Cutting inside the decoder under gradient checkpointing needs transformers >= 5.23: "
                "upgrade, or use a reducer that acts before the language model."
            )


def _numbered(first: int, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """(T,) long each, per token of items with such lengths: its item, counted from ``first``, and its place in it."""
    items = torch.arange(first, first + len(lengths), device="cpu")
    places = torch.cat([torch.arange(length, device="cpu") for length in lengths])
    return items.repeat_interleave(torch.tensor(lengths, device="cpu")), places


def _items(values: Tensor, record: VisionRecord, order: list[int], device: torch.device) -> list[Tensor]:
    """What a record holds per token (T, ...), item by item in the ``order`` of the prompt."""
    parts = values.split(record.lengths)
    return [parts[i].to(device) for i in order]
