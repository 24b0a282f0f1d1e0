# SPDX-License-Identifier: Apache-2.0
"""No reducer may make a long prefill slower than it is without; writes benchmarks/results/prefill_all.json.

Every reducer with a keep ratio, at 0.25 and its defaults, on one picture of about 1,600 visual tokens, tower
included: the CPU-size shape of Qwen2.5-VL, where a picture is a single view, or that of LLaVA-NeXT for those that the
first refuses. Runs with and without a reducer alternate. Beside the clock stands the time of the processor, which other
processes disturb less.

    python benchmarks/prefill_all.py
"""

from __future__ import annotations

import argparse
import inspect
import time
from statistics import median
from typing import Any

import torch
from harness import arguments, save

import vtoken
from vtoken.adapters.synthetic import synthetic_inputs
from vtoken.profile.shapes import random_model, shape_config
from vtoken.registry import list_reducers, reducer_class

SHAPES = ("qwen2.5-vl-small", "llava-next-small")
TOKENS = 1600
KEEP = 0.25


def reducers() -> dict[str, vtoken.Reducer]:
    """All that take a keep ratio, by name."""
    kinds = {name: reducer_class(name) for name in list_reducers()}
    return {name: kind(keep=KEEP) for name, kind in kinds.items() if "keep" in inspect.signature(kind).parameters}


def timed(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Milliseconds of a prefill by the clock, and those of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    model(**inputs, use_cache=True, logits_to_keep=1)
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3


def alternating(model: Any, reducer: vtoken.Reducer, inputs: dict[str, torch.Tensor], rounds: int) -> dict[str, Any]:
    """Medians with and without a reducer, and how much faster it is: the median over the rounds."""
    plain, reduced = [], []
    for _ in range(rounds):
        plain.append(timed(model, inputs))
        with vtoken.reduce(model, reducer):
            reduced.append(timed(model, inputs))
            stats = vtoken.stats(model)
    found: dict[str, Any] = {"selection_ms": stats.selection_seconds * 1e3}
    for place, clock in enumerate(("wall", "cpu")):
        pairs = [(a[place], b[place]) for a, b in zip(plain, reduced, strict=True)]
        found[clock] = {
            "unpruned": median(a for a, _ in pairs),
            "reduced": median(b for _, b in pairs),
            "speedup": median(a / b for a, b in pairs),
        }
    return found


def measure(shape: str, wanted: dict[str, vtoken.Reducer], args: argparse.Namespace) -> dict[str, Any]:
    """Every reducer on one shape; a sentence where it is refused."""
    config = shape_config(shape)
    if args.quick:
        config.text_config.num_hidden_layers = 4
    model = random_model(config, device=args.device)
    inputs = synthetic_inputs(model, 1, 64 if args.quick else TOKENS)
    found: dict[str, Any] = {}
    with torch.inference_mode():
        timed(model, inputs)
        for name, reducer in wanted.items():
            try:
                found[name] = one = alternating(model, reducer, inputs, args.rounds)
            except (ValueError, NotImplementedError) as error:
                found[name] = {"refused": str(error)}
                continue
            speeds = " ".join(f"{clock} {one[clock]['speedup']:.2f}x" for clock in ("wall", "cpu"))
            print(f"{shape} {name:12} {one['wall']['reduced']:7.0f} ms  {speeds}", flush=True)
    image = int((inputs["input_ids"] == config.image_token_id).sum())
    return {"visual_tokens": image, "reducers": found}


def main() -> None:
    """Measure all reducers."""
    args = arguments(__doc__, rounds=3)
    wanted = reducers()
    results: dict[str, Any] = {"keep": KEEP, "shapes": {}}
    for shape in SHAPES:
        found = measure(shape, wanted, args)
        results["shapes"][shape] = found
        wanted = {name: wanted[name] for name, one in found["reducers"].items() if "refused" in one}
        if not wanted:
            break
    save("prefill_all", results, args)


if __name__ == "__main__":
    main()
