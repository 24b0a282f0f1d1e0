# SPDX-License-Identifier: Apache-2.0
"""Every measurement that wants a GPU, in one run of under ten minutes; writes benchmarks/results/gpu_all.json.

Selection in bf16 at N = 2880, k = 288, d = 4096; encoder scores; prefill efficiency, time to first token, memory, the
session's own overhead and batches on 7B shapes with random weights (no network). Parts that fail or that the time runs
out for are recorded as such. ``--small`` runs the same code on tiny shapes, on any device.

    python benchmarks/gpu_all.py
    python benchmarks/gpu_all.py --device cpu --small --out /tmp/gpu_all.json
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import encoder_scores
import overhead
import selection
import torch
from baselines import BASELINES
from harness import arguments, geometric_mean, race, save

import vtoken
from vtoken.adapters.synthetic import synthetic_inputs
from vtoken.ops import triton_greedy
from vtoken.profile import profile
from vtoken.profile.attention import fastest_attention
from vtoken.profile.memory import peak_bytes
from vtoken.profile.shapes import random_model, shape_config

LIMIT = 570.0  # seconds: no part is begun after that
SHAPES = ("llava-next-7b", "qwen2.5-vl-7b", "llava-onevision-7b")
SMALL_SHAPES = ("llava-tiny",)
KEEP = (0.25, 0.1)
BATCHES = (1, 4, 16, 32)
CHAINED = ("llava-next-7b", "llava-tiny")
"""Shapes whose tower can be cut inside."""


def selections(args: Any) -> dict[str, Any]:
    """Every greedy selection on half-precision features, next to its baseline."""
    tokens, width, picks = (192, 64, 19) if args.small else (2880, 4096, 288)
    found: dict[str, Any] = {"triton": triton_greedy.available(torch.device(args.device))}
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    for kind in ("gaussian", "clusters"):
        x = selection.features(kind, tokens, width).to(args.device, dtype)
        w = selection.weights(tokens).to(args.device)
        for name in BASELINES:
            plain, ours = selection.calls(name, x, w, picks)
            times = race({"baseline": plain, "vtoken": ours}, 1 if name == "coverage" else args.rounds, args.device)
            shared = selection.same_picks(plain(), ours())
            memory = {"baseline": peak_bytes(plain, x.device), "vtoken": peak_bytes(ours, x.device)}
            found[f"{name} {kind}"] = {**times, "same_picks": shared, "peak_bytes": memory}
    return found


def prefills(shape: str, args: Any) -> dict[str, Any]:
    """Prefill efficiency, time to first token and memory of one shape."""
    model = _model(shape, args)
    inputs = synthetic_inputs(model, 1, 48 if args.small else 2304)
    reducers: list[vtoken.Reducer] = [kind(keep=keep) for keep in KEEP for kind in (vtoken.Random, vtoken.IDPruner)]
    if shape in CHAINED:
        reducers.append(vtoken.Chain([vtoken.TowerPrune(keep=0.3, block=0.25), vtoken.IDPruner(keep=0.1)]))
    with torch.inference_mode():
        candidates = fastest_attention(model, inputs)
    found: dict[str, Any] = {}
    for reducer in reducers:
        result = profile(model, reducer, inputs, new_tokens=args.new_tokens, rounds=args.rounds, candidates=candidates)
        found[str(reducer)] = result.as_dict()
        print(
            f"{shape} {reducer}: efficiency {result.efficiency:.2f}, first token {result.speedup('first_token'):.2f}x",
            flush=True,
        )
    return found


def session(shape: str, args: Any) -> dict[str, Any]:
    """Prefill and decode steps of a wrapped model next to the unwrapped one."""
    model = _model(shape, args)
    inputs = synthetic_inputs(model, 1, 48 if args.small else 576)
    return overhead.measure(model, inputs, args.rounds if args.small else 7 * args.rounds, args.device)


def batches(shape: str, args: Any) -> dict[str, Any]:
    """Latency and throughput of several prompts at once."""
    model, tokens, reducer = _model(shape, args), 48 if args.small else 576, vtoken.IDPruner(keep=0.1)
    with torch.inference_mode():
        candidates = fastest_attention(model, synthetic_inputs(model, 1, tokens))
    found: dict[str, Any] = {}
    for batch in (1, 2) if args.small else BATCHES:
        inputs = synthetic_inputs(model, batch, tokens)
        result = profile(model, reducer, inputs, new_tokens=args.new_tokens, rounds=2, candidates=candidates)
        found[str(batch)] = result.as_dict()
    return found


def _model(shape: str, args: Any) -> Any:
    gc.collect()
    if args.device != "cpu":
        torch.cuda.empty_cache()
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    return random_model(shape_config(shape), device=args.device, dtype=dtype)


def parts(args: Any) -> dict[str, Callable[[], Any]]:
    """What is measured, the most wanted first."""
    shapes = SMALL_SHAPES if args.small else SHAPES
    return {
        "selection": partial(selections, args),
        **{f"prefill {shape}": partial(prefills, shape, args) for shape in shapes},
        f"session {shapes[0]}": partial(session, shapes[0], args),
        f"batches {shapes[0]}": partial(batches, shapes[0], args),
        **{f"encoder {tower}": partial(encoder_scores.measure, tower, args) for tower in encoder_scores.TOWERS},
    }


def main() -> int:
    """Run all parts; 1 if one failed."""
    args = arguments(__doc__, device="cuda", rounds=3, flags=("small",))
    args.quick, args.new_tokens = args.small, 4 if args.small else 16
    started = time.monotonic()
    results: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name, part in parts(args).items():
        if time.monotonic() - started > LIMIT:
            failed[name] = "no time left"
            continue
        try:
            results[name] = part()
        except Exception as error:
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    prefilled = [found for name, found in results.items() if name.startswith("prefill ")]
    pooled = {
        f"pooled_{kind}": {
            str(keep): geometric_mean([found[str(vtoken.Random(keep=keep))][kind] for found in prefilled])
            for keep in KEEP
            if prefilled
        }
        for kind in ("efficiency", "causal_efficiency")
    }
    seconds = time.monotonic() - started
    save("gpu_all", {"parts": results, "failed": failed, **pooled, "seconds": seconds}, args)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
