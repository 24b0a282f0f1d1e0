# SPDX-License-Identifier: Apache-2.0
"""Measured cost of a prefill, unpruned and reduced in turn; never read off an accuracy run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from vtoken.compat import cache_of
from vtoken.engine.cache import cache_bytes
from vtoken.profile.clock import now, vision_clock
from vtoken.profile.spread import Ratio
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
    speedup, speedup_low, speedup_high : float
        Median and quartiles over the pairs of unpruned / reduced, see `vtoken.profile.Ratio`.
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
    speedup_low: float
    speedup_high: float
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
    vision = vision_clock(model)
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
    ratio = Ratio.of([w - vision_ms for w in whole], [r - vision_ms for r in reduced])
    return PrefillCost(
        prefill_ms=median(reduced) - vision_ms,
        unpruned_ms=median(whole) - vision_ms,
        speedup=ratio.value,
        speedup_low=ratio.low,
        speedup_high=ratio.high,
        kv_bytes=reduced_kv / rows,
        unpruned_kv_bytes=plain_kv / rows,
        vision_ms=vision_ms,
        batch_size=rows,
        pairs=pairs,
    )


def _prefill(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[float, int]:
    started = now(model)
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    return (now(model) - started) * 1e3, cache_bytes(cache_of(out))
