# SPDX-License-Identifier: Apache-2.0
"""One ``generate`` call, taken apart into phases by hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from torch import nn

from vtoken.adapters import adapter_for
from vtoken.profile.clock import FeatureClock, ModuleClock, now, vision_modules
from vtoken.reducers.base import Reducer
from vtoken.wrapping import reduce, session_of

PHASES = ("vision", "projector", "packing", "selection", "prefill", "first_token", "decode", "end_to_end")
"""Attributes of `Run`."""


@dataclass(frozen=True)
class Run:
    """Milliseconds of one answer.

    Parameters
    ----------
    vision, projector : float
        Vision tower, with what the reducer reads from it, and projector.
    packing : float
        What the model itself does to the projected tokens: crops put together, frames pooled. 0 where that is unknown.
    selection : float
        The reducer's own decisions, before the language model and inside it.
    prefill : float
        From the start to the first token, without tower, projector and packing; the selection is part of it.
    first_token : float
        From the start to the first token.
    decode : float
        A further token (median).
    end_to_end : float
        The whole answer.
    """

    vision: float
    projector: float
    packing: float
    selection: float
    prefill: float
    first_token: float
    decode: float
    end_to_end: float


@contextlib.contextmanager
def decisions(model: nn.Module, meter: Callable[[], float]) -> Iterator[Callable[[], float]]:
    """What the reducer of a wrapped model adds to ``meter`` while it decides; 0 for an unwrapped model."""
    session, spent = session_of(model), [0.0]
    if session is None:
        yield lambda: 0.0
        return

    def metered(decide: Callable[[], Any]) -> Any:
        before = meter()
        try:
            return decide()
        finally:
            spent[0] += meter() - before

    with session.metered(metered):
        yield lambda: spent[0]


def run_once(model: nn.Module, reducer: Reducer | None, inputs: Mapping[str, Any], new_tokens: int) -> Run:
    """Answer greedily with exactly ``new_tokens`` tokens, and say where the time went."""
    adapter = adapter_for(model)
    tower, projector = ModuleClock(model, adapter.tower), ModuleClock(model, adapter.projector)
    steps: list[float] = []
    handle = model.register_forward_hook(lambda *_: steps.append(now(model)))
    try:
        with (
            FeatureClock(model) as features,
            wrapped(model, reducer),
            tower,
            projector,
            decisions(model, lambda: now(model)) as selection,
        ):
            start = now(model)
            model.generate(**inputs, min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False)  # type: ignore[operator]
            end = now(model)
    finally:
        handle.remove()
    inside = len(vision_modules(model)) == 1
    encoding = tower.milliseconds + (0.0 if inside else projector.milliseconds)
    first = (steps[0] - start) * 1e3
    return Run(
        vision=encoding - projector.milliseconds,
        projector=projector.milliseconds,
        packing=max(features.milliseconds - encoding, 0.0),
        selection=selection() * 1e3,
        prefill=first - max(features.milliseconds, encoding),
        first_token=first,
        decode=median((b - a) * 1e3 for a, b in pairwise(steps)),
        end_to_end=(end - start) * 1e3,
    )


def wrapped(model: nn.Module, reducer: Reducer | None) -> contextlib.AbstractContextManager:
    """The model reduced for the length of a ``with``; as it is without a reducer."""
    return contextlib.nullcontext() if reducer is None else reduce(model, reducer)
