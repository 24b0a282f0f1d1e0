# SPDX-License-Identifier: Apache-2.0
"""Whole answers at several batch sizes: latency and throughput; writes benchmarks/results/end_to_end.json.

The gain of a batch is its throughput over that of batch 1; pruning should not lower it. Time to first token includes
the vision tower.

    python benchmarks/end_to_end.py
"""

from __future__ import annotations

from typing import Any

import torch
from harness import arguments, save

import vtoken
from vtoken.adapters.synthetic import synthetic_inputs
from vtoken.profile import Profile, profile
from vtoken.profile.shapes import random_model, shape_config

BATCHES = (1, 2, 4, 8, 16, 32)
REDUCERS = (vtoken.IDPruner(keep=0.25), vtoken.IDPruner(keep=0.1))
NEW_TOKENS = 16


def measure(model: Any, reducer: Any, args: Any) -> dict[str, Any]:
    """Profiles of one reducer at every batch size."""
    batches: dict[str, Any] = {}
    alone: Profile | None = None
    for batch in (1, 2) if args.quick else BATCHES:
        inputs = synthetic_inputs(model, batch, 256 if args.quick else args.tokens)
        found = profile(model, reducer, inputs, new_tokens=4 if args.quick else NEW_TOKENS, rounds=args.rounds)
        alone = alone or found
        gains = [now / before for now, before in zip(found.samples_per_second, alone.samples_per_second, strict=True)]
        batches[str(batch)] = {**found.as_dict(), "batch_gain": {"unpruned": gains[0], "reduced": gains[1]}}
        plain, reduced = found.samples_per_second
        print(
            f"{reducer} batch {batch}: {plain:.3g} -> {reduced:.3g} answers/s, batch gain {gains[0]:.2f} -> {gains[1]:.2f}, "  # noqa: E501
            f"first token {found.speedup('first_token'):.2f}x, decoding {found.speedup('decode'):.2f}x",
            flush=True,
        )
    return batches


def main() -> None:
    """Measure all reducers."""
    args = arguments(__doc__, tokens=576)
    gpu = args.device != "cpu"
    config = shape_config("llava-next-7b" if gpu else "llava-next-small")
    model = random_model(config, device=args.device, dtype=torch.bfloat16 if gpu else torch.float32)
    results = {str(reducer): measure(model, reducer, args) for reducer in REDUCERS}
    save("end_to_end", results, args)


if __name__ == "__main__":
    main()
