# SPDX-License-Identifier: Apache-2.0
"""Whole answers at several batch sizes: latency and throughput; writes benchmarks/results/end_to_end.json.

The gain of a batch is its throughput over that of batch 1; pruning should not lower it. Time to first token includes
the vision tower. On a CPU the prompts have 144 visual tokens each, so that 32 of them fit into the time there is.

    python benchmarks/end_to_end.py
"""

from __future__ import annotations

from typing import Any

import torch
from harness import arguments, save

import vtoken
from vtoken.adapters.synthetic import synthetic_inputs
from vtoken.profile import Profile, profile
from vtoken.profile.attention import fastest_attention
from vtoken.profile.shapes import random_model, shape_config

BATCHES = (1, 2, 4, 8, 16, 32)
REDUCER = vtoken.IDPruner(keep=0.1)
NEW_TOKENS = 16


def measure(model: Any, args: Any) -> dict[str, Any]:
    """Profiles at every batch size."""
    tokens = 576 if args.device != "cpu" else 144
    with torch.inference_mode():
        candidates = fastest_attention(model, synthetic_inputs(model, 2, tokens))
    batches: dict[str, Any] = {}
    alone: Profile | None = None
    for batch in (1, 2) if args.quick else BATCHES:
        inputs = synthetic_inputs(model, batch, tokens)
        steps = 4 if args.quick else NEW_TOKENS
        found = profile(model, REDUCER, inputs, new_tokens=steps, rounds=args.rounds, candidates=candidates)
        alone = alone or found
        gains = [now / before for now, before in zip(found.samples_per_second, alone.samples_per_second, strict=True)]
        batches[str(batch)] = {**found.as_dict(), "batch_gain": {"unpruned": gains[0], "reduced": gains[1]}}
        plain, reduced = found.samples_per_second
        print(
            f"batch {batch}: {plain:.3g} -> {reduced:.3g} answers/s, batch gain {gains[0]:.2f} -> {gains[1]:.2f}, "
            f"first token {found.speedup('first_token'):.2f}x, decoding {found.speedup('decode'):.2f}x",
            flush=True,
        )
    return batches


def main() -> None:
    """Measure one reducer."""
    args = arguments(__doc__, rounds=3)
    gpu = args.device != "cpu"
    config = shape_config("llava-1.5-7b" if gpu else "llava-small")
    if args.quick:
        config.text_config.num_hidden_layers = 2
    model = random_model(config, device=args.device, dtype=torch.bfloat16 if gpu else torch.float32)
    save("end_to_end", {"reducer": str(REDUCER), "new_tokens": NEW_TOKENS, "batches": measure(model, args)}, args)


if __name__ == "__main__":
    main()
