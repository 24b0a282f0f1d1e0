# SPDX-License-Identifier: Apache-2.0
"""What the session itself costs: wrapped at keep=1.0 against unwrapped, and decode steps of a pruned model; writes
benchmarks/results/overhead.json.

One model is wrapped and unwrapped between the runs, which the clock does not see: a copy of a model may be a
millisecond slower or faster than the model itself. A decode step runs on the cache of its own prefill, without a mask
as ``generate`` calls it for an unpadded batch. One thread on a CPU: what is measured is Python's work, which a
second one only disturbs.

    python benchmarks/overhead.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from harness import arguments, round_times, save, summary
from scipy.stats import quantile_test

import vtoken
from vtoken.adapters.synthetic import synthetic_inputs
from vtoken.profile.shapes import random_model, shape_config

STEPS = 8
"""Decode steps a round."""
TARGETS = {"prefill_share": 0.01, "decode_ms": 0.1}
REDUCERS = {
    "keep all": vtoken.Random(keep=1.0),
    "before the decoder": vtoken.Random(keep=0.1),
    "inside the decoder": vtoken.FastV(keep=0.1, layer=1),
}


def decoding(model: Any, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """A decode step behind a prefill that is done once; the cache goes back to its length afterwards."""

    def forward(**call: Any) -> Any:
        return model(**call, use_cache=True, logits_to_keep=1)

    first = forward(**inputs)
    cache, token = first.past_key_values, first.logits[:, -1:].argmax(-1)
    place = torch.full_like(token, inputs["input_ids"].shape[1])

    def run() -> None:
        forward(input_ids=token, position_ids=place, past_key_values=cache)
        cache.crop(-1)

    return run


def measure(model: Any, inputs: dict[str, torch.Tensor], rounds: int, device: str) -> dict[str, Any]:
    """Milliseconds of a prefill and of a decode step, unwrapped and wrapped, and what is added."""
    around = {name: functools.partial(vtoken.reduce, model, reducer) for name, reducer in REDUCERS.items()}
    with torch.inference_mode():
        steps: dict[str, Callable[[], Any]] = {"unwrapped": decoding(model, inputs)}
        for name, wrapped in around.items():
            with wrapped():
                steps[name] = decoding(model, inputs)
        both = dict.fromkeys(("unwrapped", "keep all"), lambda: model(**inputs, use_cache=True, logits_to_keep=1))
        first = round_times(both, rounds, device, around=around)
        later = round_times(steps, STEPS * rounds, device, warmup=3, around=around)
    plain = median(first["unwrapped"])
    return {
        "prefill": summary(first),
        "decode": summary(later),
        "prefill_share": [ms / plain for ms in added(first, "keep all")],
        "decode_ms_added": {name: added(later, name) for name in REDUCERS},
        "targets": TARGETS,
    }


def added(found: dict[str, list[float]], name: str) -> list[float]:
    """Milliseconds that ``name`` takes more than the unwrapped run of the same round: the median over the rounds, and
    the bounds of its 95 % confidence interval."""
    more = [mine - plain for plain, mine in zip(found["unwrapped"], found[name], strict=True)]
    return [median(more), *quantile_test(more, p=0.5).confidence_interval(0.95)]


def main() -> None:
    """Measure two decoders: one of many thin layers, in which hooks weigh most, and one that computes."""
    args = arguments(__doc__, rounds=61, threads=1)
    gpu = args.device != "cpu"
    dtype = torch.bfloat16 if gpu else torch.float32
    thin = shape_config("llava-tiny")
    thin.text_config.num_hidden_layers = 4 if args.quick else 28
    thin.vision_config.image_size = 336  # one picture of 576 tokens
    shapes = {"28 thin layers": (thin, 10 * args.rounds)}
    if not args.quick:
        shapes["llava-1.5"] = shape_config("llava-1.5-7b" if gpu else "llava-small"), args.rounds
    results = {}
    for name, (config, rounds) in shapes.items():
        model = random_model(config, device=args.device, dtype=dtype)
        results[name] = found = measure(model, synthetic_inputs(model, 1, 576), rounds, args.device)
        more = ", ".join(f"{key} {value:+.3f} ms" for key, (value, *_) in found["decode_ms_added"].items())
        print(f"{name}: prefill {found['prefill_share'][0]:+.2%}, decode step {more}", flush=True)
    save("overhead", results, args)


if __name__ == "__main__":
    main()
