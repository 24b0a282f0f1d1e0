# SPDX-License-Identifier: Apache-2.0
"""Measured cost of a prefill, unpruned and reduced in turn; never read off an accuracy run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from vtoken.adapters import adapter_for
from vtoken.cache import cache_bytes
from vtoken.reducers.base import Reducer
from vtoken.wrapping import reduce


@dataclass(frozen=True)
class PrefillCost:
    """Medians over alternating runs on one batch.

    Parameters
    ----------
    prefill_ms, unpruned_ms : float
        Forward pass without the vision encoding of the unpruned model: language model, selection, and whatever a
        reducer adds to the vision tower.
    speedup : float
        Median over the pairs of unpruned / reduced.
    kv_bytes, unpruned_kv_bytes : float
        Keys and values held after the prefill, per prompt.
    vision_ms : float
        Vision tower and projector of the unpruned model.
    batch_size, pairs : int
        Prompts in the batch, and how many pairs were measured.
    """

    prefill_ms: float
    unpruned_ms: float
    speedup: float
    kv_bytes: float
    unpruned_kv_bytes: float
    vision_ms: float
    batch_size: int
    pairs: int

    def as_dict(self) -> dict[str, Any]:
        """A flat mapping."""
        return asdict(self)


def measure_prefill(
    model: nn.Module, reducer: Reducer | None, inputs: Mapping[str, Any], *, pairs: int = 5, warmup: int = 1
) -> PrefillCost:
    """Time the prefill of one batch with and without a reducer.

    The two alternate, so that a machine that gets slower or faster meanwhile treats both alike.

    Parameters
    ----------
    model : nn.Module
        Unwrapped.
    reducer : Reducer or None
        None measures the unpruned model alone.
    inputs : mapping
        Of the model's forward, with pictures.
    pairs, warmup : int
        Runs of each kind that count, and that do not.
    """
    vision = _VisionClock(model)
    whole: list[float] = []
    reduced: list[float] = []
    encode: list[float] = []
    with torch.inference_mode():
        for number in range(-warmup, pairs):
            with vision:
                plain_ms, plain_kv = _prefill(model, inputs)
            reduced_ms, reduced_kv = plain_ms, plain_kv
            if reducer is not None:
                with reduce(model, reducer):
                    reduced_ms, reduced_kv = _prefill(model, inputs)
            if number >= 0:
                whole.append(plain_ms)
                reduced.append(reduced_ms)
                encode.append(vision.milliseconds)
    rows, vision_ms = len(inputs["input_ids"]), median(encode)
    return PrefillCost(
        prefill_ms=median(reduced) - vision_ms,
        unpruned_ms=median(whole) - vision_ms,
        speedup=median((w - vision_ms) / max(r - vision_ms, 1e-6) for w, r in zip(whole, reduced, strict=True)),
        kv_bytes=reduced_kv / rows,
        unpruned_kv_bytes=plain_kv / rows,
        vision_ms=vision_ms,
        batch_size=rows,
        pairs=pairs,
    )


def _prefill(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[float, int]:
    started = _now(model)
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    return (_now(model) - started) * 1e3, cache_bytes(out.past_key_values)


def _now(model: nn.Module) -> float:
    """Host time after everything queued on the device is done."""
    device = next(model.parameters()).device
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class _VisionClock:
    """Adds up the time spent in the vision tower and the projector while entered."""

    def __init__(self, model: nn.Module) -> None:
        adapter = adapter_for(model)
        self.model, self.modules = model, (adapter.tower, adapter.projector)
        self.milliseconds = 0.0
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        self.milliseconds = 0.0
        for module in self.modules:
            start, stop = self._hooks()
            self._handles += [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]

    def __exit__(self, *exc: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _hooks(self) -> tuple[Callable, Callable]:
        begun: list[float] = []

        def start(module: nn.Module, args: tuple) -> None:
            begun.append(_now(self.model))

        def stop(module: nn.Module, args: tuple, output: Any) -> None:
            self.milliseconds += (_now(self.model) - begun.pop()) * 1e3

        return start, stop
