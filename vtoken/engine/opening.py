# SPDX-License-Identifier: Apache-2.0
"""From a call of the model to its language model: what is encoded, what the caller says, and whether it is a prefill.

These are the hooks before the language model. What they find out they leave in the call's `Forward`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtoken import compat
from vtoken.engine import cache as kv
from vtoken.engine import masks
from vtoken.engine.forward import TWO_THREADS, Forward, is_inside
from vtoken.engine.prompt import Generation, Generations, generation_of
from vtoken.engine.tower import VisionRecord

if TYPE_CHECKING:
    from vtoken.engine.session import Session

EXPORT = (
    "torch.export cannot follow a model wrapped by vtoken at keep < 1, whose sequence gets as short as its pictures "
    "say: export the unwrapped model, or one wrapped at keep=1.0, and use vtoken.shorten for its inputs."
)
COMPILED = (
    "vtoken chooses tokens outside of compiled code, as their number depends on the pictures: use torch.compile "
    "without fullgraph=True, or keep=1.0."
)
MERGES = (
    "{name} encodes pictures and merges them into the prompt itself, without telling its {inner}, so that visual "
    "tokens cannot be told from text: wrap its {inner} and pass the pictures to that."
)


class Opening:
    """The hooks of one session before the language model."""

    def __init__(self, session: Session) -> None:
        self.session, self.adapter = session, session.adapter
        self.generations = Generations()

    # ------------------------------------------------------------------ around generate
    def generating(self, original: Callable) -> Callable:
        """Notes where the prompt ends: drafts and generated tokens are no part of it."""

        def generate(*args: Any, **kwargs: Any) -> Any:
            start = kv.logical_length(compat.ours(kwargs).get("past_key_values"))
            generation = generation_of(args[0] if args else kwargs.get("inputs"), kwargs, start)
            if generation is None:
                return original(*args, **kwargs)
            with self.generations.inside(generation):
                return original(*args, **kwargs)

        return generate

    def static_masks(self, original: Callable) -> Callable:
        """Static caches: generate() prepares 4-D masks before calling forward."""

        def make(*args: Any, **kwargs: Any) -> Any:
            cache: Any = compat.ours(kwargs).get("past_key_values")
            if kv.pruned_of(cache) is None:
                return original(*args, **kwargs)
            new = kwargs["inputs_embeds"].shape[1]
            mask = masks.columns_of(cache, 0, new, kwargs.get("attention_mask"))
            kv.serve(cache, True)
            try:
                return original(*args, **{**kwargs, "attention_mask": mask})
            finally:
                kv.serve(cache, False)

        return make

    # ------------------------------------------------------------------ vision side
    def encoding(self, modality: str) -> Callable[[Callable], Callable]:
        """Watches the tower while the model encodes, within a forward pass or before it."""
        session, reader = self.session, self.session.reader

        def make(original: Callable) -> Callable:
            def read(*args: Any, **kwargs: Any) -> Any:
                if (session.work.idle and torch.compiler.is_compiling()) or reader.thread == threading.get_ident():
                    return original(*args, **kwargs)
                if reader.thread is not None:
                    raise RuntimeError(TWO_THREADS)
                if not session.work.idle:  # LLaVA of transformers 5.24 hands the text's lengths on to its tower
                    kwargs = {name: value for name, value in kwargs.items() if name not in masks.LENGTHS}
                output, record = reader(original, modality, *args, **kwargs)
                forward, generation = session.forward, self.generations.now
                if forward is not None and forward.thread == threading.get_ident() and forward.kinds is not None:
                    forward.records[modality] = record
                elif generation is not None:
                    generation.records[modality] = record
                return output

            return read

        return make

    # ------------------------------------------------------------------ the outermost module
    def model_pre(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Notes labels, pictures, and the mask that a load-balancing loss must not see: its rows are real ones only."""
        if torch.compiler.is_compiling():
            return None
        pictures, routes = self._brings_pictures(kwargs), self._routes(kwargs)
        if kwargs.get("labels") is None and not pictures and not routes:
            return None
        forward = Forward(kwargs.get("past_key_values"), kwargs.get("labels"), pictures)
        self.session.claim(forward)
        mask = kwargs.get("attention_mask")
        if routes and pictures and isinstance(mask, Tensor) and mask.dim() == 2:
            forward.mask_to_hand_on = mask
            return args, {**kwargs, "attention_mask": None}
        return None

    def _routes(self, kwargs: dict[str, Any]) -> bool:
        """Whether the call asks for router logits, over which a loss is taken."""
        asked = kwargs.get("output_router_logits")
        if asked is None:
            asked = getattr(self.adapter.language_model.config, "output_router_logits", False)
        return bool(asked)

    def _brings_pictures(self, call: dict[str, Any]) -> bool:
        encoded = call.get("mm_encoder_outputs") or {}
        pixels = any(call.get(key) is not None for key in self.adapter.pixel_keys)
        return pixels or any(output is not None for output in encoded.values())

    # ------------------------------------------------------------------ the outer module: is this a prefill?
    def outer_pre(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Opens a `Forward`, unless compiled code needs nothing of it."""
        if torch.compiler.is_compiling():
            if self.session.work.idle and kv.pruned_of(kwargs.get("past_key_values")) is None:
                return None
            if torch.compiler.is_exporting():
                raise NotImplementedError(EXPORT)
            if not self._brings_pictures(kwargs) and needs_nothing(kwargs.get("past_key_values")):
                return None
        return self._open(module, args, kwargs)

    @torch.compiler.disable(reason=COMPILED)
    def _open(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        call = kwargs
        if args:  # reading a signature takes as long as a few decoder layers' hooks
            call = compat.call_of(module, args, kwargs)
        cache: Any = call.get("past_key_values")
        forward = self._forward_of(cache)
        mask = call.get("attention_mask")
        if forward.mask_to_hand_on is not None and mask is None:
            mask = forward.mask_to_hand_on
            kwargs = {**kwargs, "attention_mask": mask}
        given = call["input_ids"] if call.get("input_ids") is not None else call.get("inputs_embeds")
        if given is None:
            return None  # the model raises its own error
        if given.shape[0] == 0 or given.shape[1] == 0:
            raise ValueError(f"The batch is empty (input of shape {tuple(given.shape)}): pass at least one token.")
        if self._brings_pictures(call):
            self._note_pictures(forward, call)
        elif forward.pictures:
            name, inner = type(self.adapter.model).__name__, type(module).__name__
            raise NotImplementedError(MERGES.format(name=name, inner=inner))
        if kv.pruned_of(cache) is not None and given.shape[1] > 1 and not self.session.work.idle:
            masks.check_turn_window(self.adapter, cache, kv.logical_length(cache) + given.shape[1])
        found = forward.enter_cache(given, mask)
        return (args, kwargs) if found is mask else (args, {**kwargs, "attention_mask": found})

    def _forward_of(self, cache: Any) -> Forward:
        """The `Forward` that the outermost module opened for this call, or a new one."""
        session, me = self.session, threading.get_ident()
        forward = session.forward
        waiting = forward is not None and forward.thread == me and not forward.entered
        if not waiting or not is_inside(me, (self.adapter.model,)):
            forward = Forward(cache)
            session.claim(forward)
        assert forward is not None
        forward.cache, forward.entered = cache, True  # from here on it is this call's alone
        return forward

    def _note_pictures(self, forward: Forward, call: dict[str, Any]) -> None:
        kinds = self.adapter.modality_in(call)
        if not bool((kinds > 0).any()):
            return
        forward.kinds, forward.ids = kinds, call.get("input_ids")
        past, generation = kv.logical_length(forward.cache), self.generations.now
        encoded = call.get("mm_encoder_outputs") or {}
        forward.take_encoded(self.adapter, encoded, generation, past)
        if not self.session.work.idle:
            masks.check_turn_window(self.adapter, forward.cache if kv.is_static(forward.cache) else None, 0)
        if generation is not None and generation.start <= past:
            self._check_chunk(generation, past, past + kinds.shape[1])

    def _check_chunk(self, generation: Generation, past: int, end: int) -> None:
        """Refuse a chunk of the prompt with pictures where what is done with them depends on other chunks."""
        session, behind, before = self.session, generation.length - end, past - generation.start
        if session.work.reads_question and (behind > 0 or before > 0):
            part = f"{behind} tokens behind" if behind > 0 else f"{before} tokens before"
            raise NotImplementedError(
                f"Reducer {session.reducer.name!r} reads the text of the prompt, of which prefill_chunk_size leaves "
                f"{part} the picture to other chunks: choose a larger prefill_chunk_size, or a reducer that does not "
                "read text."
            )
        if before > 0 and any(light.changes_attention for light in session.work.light.values()):
            raise NotImplementedError(
                f"Reducer {session.reducer.name!r} lets visual tokens see little of each other, and prefill_chunk_size "
                "hides those of earlier chunks from it: choose a larger prefill_chunk_size."
            )

    # ------------------------------------------------------------------ models without an outer module
    def announce(self, kinds: Tensor, record: VisionRecord, first: Tensor, labels: Tensor | None = None) -> None:
        """The next ``inputs_embeds`` of the language model hold visual tokens, the first of which is ``first`` (D,)."""
        forward = Forward(None, labels)
        forward.kinds, forward.first = kinds, first
        forward.records["image"] = record
        self.session.claim(forward)
        if (generation := self.generations.now) is not None:
            generation.length = kinds.shape[1]  # the ids that generate() was given had one placeholder for a picture

    @torch.compiler.disable(reason=COMPILED)
    def bare_pre(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """`outer_pre` for them; returns the arguments of the language model."""
        session, me = self.session, threading.get_ident()
        cache: Any = kwargs.get("past_key_values")
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        given = kwargs["input_ids"] if embeds is None else embeds
        forward = session.forward
        if forward is None or forward.thread != me or forward.entered or not forward.announced_for(embeds):
            forward = Forward(cache)
            session.claim(forward)
        forward.cache, forward.entered = cache, True  # from here on it is this call's alone
        found = forward.enter_cache(given, mask)
        return kwargs if found is mask else {**kwargs, "attention_mask": found}


def needs_nothing(cache: Any) -> bool:
    """Whether a step without pictures needs no hook before the decoder's layers: static caches have masks prepared."""
    if cache is None:
        return True
    pruned = kv.pruned_of(cache)
    return kv.is_static(cache) and (pruned is None or pruned.shift is None)
