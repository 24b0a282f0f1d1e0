# SPDX-License-Identifier: Apache-2.0
"""What a reducer costs and saves on one batch: every phase of an answer, memory, and nearness to the FLOP limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from vtoken.adapters import adapter_for
from vtoken.compat import cache_of
from vtoken.engine.cache import cache_bytes
from vtoken.profile.attention import available_attention, fastest_attention
from vtoken.profile.flops import prefill_flops
from vtoken.profile.memory import peak_bytes
from vtoken.profile.run import PHASES, Run, run_once, wrapped
from vtoken.profile.spread import Ratio, Spread, alternate
from vtoken.reducers.base import Reducer
from vtoken.wrapping import stats


@dataclass(frozen=True)
class Side:
    """One of the two things compared.

    Parameters
    ----------
    milliseconds : dict
        `Spread` of each of `vtoken.profile.run.PHASES`.
    tokens : float
        Visual tokens that enter the language model, per prompt.
    peak_bytes : int
        Most memory that a prefill holds beyond weights and inputs.
    kv_bytes : int
        Keys and values after the prefill.
    prefill_flops : int
        Counted operations of the language model's prefill, without the selection.
    causal_flops : int
        Those that remain if the future keys that a causal kernel skips do not count.
    """

    milliseconds: dict[str, Spread]
    tokens: float
    peak_bytes: int
    kv_bytes: int
    prefill_flops: int
    causal_flops: int

    @property
    def end_to_end(self) -> float:
        """Milliseconds of a whole answer."""
        return self.milliseconds["end_to_end"].median


@dataclass(frozen=True)
class Profile:
    """A reducer against the unpruned model.

    Parameters
    ----------
    batch, new_tokens, rounds : int
        Prompts at once, tokens of each answer, runs that count.
    attention : dict
        Milliseconds of an unpruned prefill by attention backend; the fastest is the baseline.
    unpruned, reduced : Side
        Both, measured in turn.
    ratios : dict
        `speedup` of each phase with its quartiles over the rounds; without the selection, which one side has not.
    """

    batch: int
    new_tokens: int
    rounds: int
    attention: dict[str, float]
    unpruned: Side
    reduced: Side
    ratios: dict[str, Ratio]

    def speedup(self, phase: str) -> float:
        """Unpruned / reduced time of a phase: the ratio of the medians."""
        return _ratio_of_medians(self.unpruned, self.reduced, phase)

    @property
    def flop_limit(self) -> float:
        """Unpruned / reduced operations of the prefill: the speed-up of a machine without any other cost."""
        return self.unpruned.prefill_flops / max(self.reduced.prefill_flops, 1)

    @property
    def efficiency(self) -> float:
        """Measured speed-up of the prefill as a share of `flop_limit`."""
        return self.speedup("prefill") / self.flop_limit

    @property
    def causal_limit(self) -> float:
        """`flop_limit` without the future keys that causal kernels skip in both models."""
        return self.unpruned.causal_flops / max(self.reduced.causal_flops, 1)

    @property
    def causal_efficiency(self) -> float:
        """Measured speed-up of the prefill as a share of `causal_limit`."""
        return self.speedup("prefill") / self.causal_limit

    @property
    def samples_per_second(self) -> tuple[float, float]:
        """Whole answers per second, unpruned and reduced."""
        return self.batch / self.unpruned.end_to_end * 1e3, self.batch / self.reduced.end_to_end * 1e3

    def as_dict(self) -> dict[str, Any]:
        """What was measured and what follows from it, for JSON."""
        rates = self.samples_per_second
        return {
            **asdict(self),
            "speedup": {phase: self.speedup(phase) for phase in self.ratios},
            "flop_limit": self.flop_limit,
            "efficiency": self.efficiency,
            "causal_limit": self.causal_limit,
            "causal_efficiency": self.causal_efficiency,
            "samples_per_second": {"unpruned": rates[0], "reduced": rates[1]},
        }


def profile(
    model: nn.Module,
    reducer: Reducer,
    inputs: Mapping[str, Any],
    *,
    new_tokens: int = 8,
    rounds: int = 5,
    warmup: int = 1,
    attention: str | None = None,
    candidates: Mapping[str, float] | None = None,
    step: Callable[[], object] = lambda: None,
) -> Profile:
    """Measure a reducer on one batch, in runs that alternate with the unpruned model.

    Parameters
    ----------
    model : nn.Module
        Unwrapped.
    reducer : Reducer
        What is measured.
    inputs : mapping
        Of the model's ``generate``, with pixels.
    new_tokens : int
        Tokens of each answer, at least 2: the first belongs to the prefill.
    rounds, warmup : int
        Runs of each kind that count, and that do not.
    attention : str, optional
        Backend of the reduced model; by default the baseline's. The unpruned model always gets the fastest.
    candidates : mapping, optional
        What `fastest_attention` has found for this model before, where several reducers or batches are measured.
    step : callable
        Called `count_steps` times, after each run.

    Raises
    ------
    ValueError
        If ``new_tokens`` or ``rounds`` is too small.
    """
    if new_tokens < 2:
        raise ValueError(f"new_tokens={new_tokens} leaves no decoding step to measure: give at least 2.")
    if rounds < 1:
        raise ValueError(f"rounds={rounds} measures nothing: give at least 1.")
    before = getattr(model.config, "_attn_implementation", None)
    with torch.inference_mode():
        candidates = dict(candidates or fastest_attention(model, inputs, step=step))
        fastest = min(candidates, key=candidates.__getitem__)
        sides = {"unpruned": (None, fastest), "reduced": (reducer, attention or fastest)}
        try:
            runs = {
                name: lambda chosen=chosen: _run(model, chosen, inputs, new_tokens) for name, chosen in sides.items()
            }
            found = alternate(runs, rounds, warmup, step)
            both = {}
            for name, side in sides.items():
                both[name] = _side(model, *side, inputs, found[name])
                step()
        finally:
            if before is not None:
                model.set_attn_implementation(before)  # type: ignore[operator]
    times = {name: {phase: [getattr(run, phase) for run in found[name]] for phase in PHASES} for name in sides}
    plain, reduced = both["unpruned"], both["reduced"]
    ratios = {
        phase: Ratio.of(times["unpruned"][phase], times["reduced"][phase], _ratio_of_medians(plain, reduced, phase))
        for phase in PHASES
        if phase != "selection"
    }
    return Profile(len(inputs["input_ids"]), new_tokens, rounds, candidates, **both, ratios=ratios)


def count_steps(model: nn.Module, rounds: int, warmup: int = 1) -> int:
    """How often `profile` calls its ``step``: each attention backend thrice, then both sides, then their memory."""
    return 3 * len(available_attention(model)) + 2 * (rounds + warmup) + 2


def _ratio_of_medians(unpruned: Side, reduced: Side, phase: str) -> float:
    return unpruned.milliseconds[phase].median / max(reduced.milliseconds[phase].median, 1e-9)


def _run(model: nn.Module, chosen: tuple[Reducer | None, str], inputs: Mapping[str, Any], new_tokens: int) -> Run:
    reducer, attention = chosen
    model.set_attn_implementation(attention)  # type: ignore[operator]
    return run_once(model, reducer, inputs, new_tokens)


def _side(
    model: nn.Module, reducer: Reducer | None, attention: str, inputs: Mapping[str, Any], runs: list[Run]
) -> Side:
    model.set_attn_implementation(attention)  # type: ignore[operator]
    rows = len(inputs["input_ids"])
    with wrapped(model, reducer):
        caches: list[int] = []

        def prefill() -> None:
            caches.append(cache_bytes(cache_of(model(**inputs, use_cache=True, logits_to_keep=1))))

        peak = peak_bytes(prefill, next(model.parameters()).device)
        flops = prefill_flops(model, inputs)
        kept = adapter_for(model).modality(inputs["input_ids"], None).gt(0).sum().item()
        if reducer is not None:
            kept = stats(model).tokens_kept
    return Side(
        milliseconds={phase: Spread.of([getattr(run, phase) for run in runs]) for phase in PHASES},
        tokens=kept / rows,
        peak_bytes=peak,
        kv_bytes=caches[0],
        prefill_flops=flops.counted,
        causal_flops=flops.causal,
    )
