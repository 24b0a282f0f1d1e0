# SPDX-License-Identifier: Apache-2.0
"""A reducer at work on a model: hooks in, hooks out.

Contract: every shape visible from outside stays (logits, labels, ``generate``'s ids, masks and positions,
``cache.get_seq_length()``); only what the decoder computes and stores is shorter. The state of a call lives in its
`Forward`, that of a pruned prefill in its `Prefill`, and what a cache holds in the cache's layers. A session holds what
outlives calls: its hooks, and the statistics of the last prefill. What a hook does is in `opening` and `running`.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import nn
from transformers.masking_utils import create_masks_for_generate

from vtoken import compat
from vtoken.adapters.base import MODALITIES, Adapter
from vtoken.context import Cut, VisualContext
from vtoken.engine.forward import TWO_THREADS, Forward, is_inside
from vtoken.engine.hooks import AdapterHooks
from vtoken.engine.light.decoder import LightDecoder
from vtoken.engine.opening import Opening
from vtoken.engine.prefill import Prefill
from vtoken.engine.running import Running
from vtoken.engine.tower import VisionReader
from vtoken.engine.work import Work
from vtoken.methods import replace_method
from vtoken.precision import without_autocast
from vtoken.reducers.base import Reducer
from vtoken.stats import Stats


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
        self.work = work = Work.of(adapter, reducer, backend)
        work.check_limits(adapter, reducer, positions, backend)
        reads, projector = ((), False) if work.idle else (reducer.encoder_reads(), reducer.needs_projector)
        self.reader = VisionReader(adapter, reads, projector, reducer.cutter, reducer.resampler)
        self.light = LightDecoder(adapter, work.light, work.taps)
        self.opening, self.running = Opening(self), Running(self)
        self.forward: Forward | None = None  # changed by `claim` and `release` only
        self._claiming = threading.Lock()
        self._stats: Stats | Callable[[], Stats] | None = None
        self._meter: Callable[[Callable[[], Any]], Any] | None = None
        self._handles: list[Any] = []
        self._undo: list[Callable[[], None]] = []

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "A wrapped model cannot be pickled, as its hooks belong to this process: unwrap it before and wrap the "
            "loaded one, copy it with copy.deepcopy, or use save_pretrained."
        )

    # ------------------------------------------------------------------ attach and detach
    def attach(self) -> None:
        """Install all hooks and instance-level wraps."""
        forget_compiled()
        try:
            self._attach()
        except BaseException:
            self.detach()
            raise

    def _attach(self) -> None:
        adapter, opening, running = self.adapter, self.opening, self.running
        check_signatures(adapter)
        if adapter.outer is not None:
            if adapter.model is not adapter.outer and not self.work.idle:
                self._before(adapter.model, opening.model_pre)
            self._before(adapter.outer, opening.outer_pre)
            for modality in MODALITIES:
                if hasattr(adapter.outer, name := f"get_{modality}_features"):
                    self._replace(adapter.outer, name, opening.encoding(modality))
        self._before(adapter.language_model, running.language_pre)
        # always_call: a pass that raises is closed too
        after = adapter.language_model.register_forward_hook(running.language_post, with_kwargs=True, always_call=True)
        self._handles.append(after)
        self._handles += self.light.attach(lambda: self.prefill)
        if hasattr(adapter.generator, "generate"):
            if not self.work.idle:
                self._replace(adapter.generator, "generate", opening.generating)
            name = "create_masks_for_generate"
            self._replace(adapter.generator, name, opening.static_masks, create_masks_for_generate)
        adapter.install(AdapterHooks(self._replace, self.reader, opening.announce, running.rows, running.places))

    def detach(self) -> None:
        """Remove every trace."""
        if self.forward is not None:  # left open by an interrupt
            self.release(self.forward)
        self.running.watch_layers(False)
        for handle in self._handles:
            handle.remove()
        for undo in reversed(self._undo):
            undo()
        self._handles.clear()
        self._undo.clear()
        forget_compiled()

    def _before(self, module: nn.Module, hook: Callable) -> None:
        self._handles.append(module.register_forward_pre_hook(compat.hook(hook), with_kwargs=True))

    def _replace(self, owner: Any, name: str, make: Callable[[Callable], Callable], default: Any = None) -> None:
        """Put ``make(original)`` in the place of a method of one instance until `detach`."""
        self._undo.append(replace_method(owner, name, make, default))

    # ------------------------------------------------------------------ the call that is under way
    def claim(self, forward: Forward) -> None:
        """Make a call the one that is under way.

        Raises
        ------
        RuntimeError
            If another thread is inside of one.
        """
        with self._claiming:
            last = self.forward
            if last is not None and last.thread != forward.thread:
                adapter = self.adapter
                if is_inside(last.thread, (adapter.model, adapter.outer, adapter.language_model)):
                    raise RuntimeError(TWO_THREADS)
            self.forward = forward  # safe: the last one's thread has left it, by an interrupt or its death
        if last is not None and last is not forward:
            last.close()

    def release(self, forward: Forward) -> None:
        """End a call."""
        with self._claiming:
            if self.forward is forward:
                self.forward = None
        forward.close()

    @property
    def prefill(self) -> Prefill | None:
        """The prefill that is under way."""
        return None if self.forward is None else self.forward.prefill

    # ------------------------------------------------------------------ the reducer
    def decide(self, choose: Callable[..., Any], *args: Any) -> Any:
        """Ask the reducer, in float32; the only place from which its decisions are called."""
        ctx: VisualContext = args[-1]
        with without_autocast(ctx.hidden.device):
            return choose(*args) if self._meter is None else self._meter(lambda: choose(*args))

    def first_cut(self, ctx: VisualContext) -> Cut | None:
        """What the reducer does before the language model."""
        return None if self.work.idle else self.decide(self.reducer.before_llm, ctx)

    @contextlib.contextmanager
    def metered(self, meter: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
        """While open, decisions are made by ``meter(decide)``, which returns what ``decide()`` returns."""
        before, self._meter = self._meter, meter
        try:
            yield
        finally:
            self._meter = before

    # ------------------------------------------------------------------ statistics
    @property
    def stats(self) -> Stats | None:
        """Of the last prefill; where nothing was reduced they are counted when somebody asks."""
        if callable(self._stats):
            self._stats = self._stats()
        return self._stats

    def report(self, stats: Stats | Callable[[], Stats]) -> None:
        """Set the statistics of the last prefill, or what counts them."""
        self._stats = stats


def check_signatures(adapter: Adapter) -> None:
    """Make sure that all which is hooked takes what hooks replace, before a pass fails far from the reason.

    Raises
    ------
    NotImplementedError
        If a module does not, in the installed transformers.
    """
    if adapter.outer is not None:
        compat.check_takes(adapter.outer, adapter.outer_takes)
    compat.check_takes(adapter.language_model, ("inputs_embeds", "attention_mask", "position_ids", compat.CACHE))
    for layer in {type(layer): layer for layer in adapter.layers}.values():
        compat.check_takes(layer, ("attention_mask", compat.CACHE))


def forget_compiled() -> None:
    """Drop what torch.compile made: its graphs are not guarded on hooks, and would go on without them or with them."""
    if "torch._dynamo" in sys.modules and torch._dynamo.utils.counters["frames"]["total"]:
        torch._dynamo.reset()
