# SPDX-License-Identifier: Apache-2.0
"""How near a pruned prefill comes to its FLOP ratio; writes benchmarks/results/prefill_efficiency.json.

Token layouts of LLaVA-NeXT, Qwen2.5-VL and LLaVA-OneVision clips, at full size on a GPU and with a decoder of 8 layers
of width 2048 on a CPU. The selection is `random`, which costs nothing: what is measured is everything else.

The limit that counts is that of the operations which are executed: torch's counter takes causal attention for complete,
which no kernel computes. Its limit stands beside it.

    python benchmarks/prefill_efficiency.py
"""

from __future__ import annotations

from typing import Any

import torch
from harness import arguments, geometric_mean, save

import vtoken
from vtoken.adapters.synthetic import synthetic_inputs
from vtoken.profile import profile
from vtoken.profile.attention import fastest_attention
from vtoken.profile.shapes import random_model, shape_config

FAMILIES = ("llava-next", "qwen2.5-vl", "llava-onevision")
KEEP = (0.25, 0.1)
TOKENS = 2880  # of a LLaVA-NeXT picture
WIDE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_hidden_layers": 8}


def wide_config(family: str, quick: bool) -> Any:
    """The small shape of a family with a decoder that a CPU is kept busy by."""
    config = shape_config(f"{family}-small")
    text, changes = config.text_config, {"num_hidden_layers": 2} if quick else WIDE
    groups = text.num_attention_heads // text.num_key_value_heads
    for name, value in changes.items():
        setattr(text, name, value)
    text.num_key_value_heads = text.num_attention_heads // groups
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    if hasattr(config.vision_config, "out_hidden_size"):
        config.vision_config.out_hidden_size = text.hidden_size
    return config


def measure(family: str, args: Any) -> dict[str, Any]:
    """Profiles of one family at every keep ratio."""
    gpu = args.device != "cpu"
    config = shape_config(f"{family}-7b") if gpu else wide_config(family, args.quick)
    model = random_model(config, device=args.device, dtype=torch.bfloat16 if gpu else torch.float32)
    inputs = synthetic_inputs(model, 1, 256 if args.quick else TOKENS)
    with torch.inference_mode():
        candidates = fastest_attention(model, inputs)
    found = {}
    for keep in KEEP:
        reducer = vtoken.Random(keep=keep)
        result = profile(model, reducer, inputs, new_tokens=2, rounds=args.rounds, candidates=candidates)
        found[str(keep)] = result.as_dict()
        print(
            f"{family:16} keep={keep}: {result.unpruned.tokens:.0f} tokens, {result.speedup('prefill'):.2f}x of "
            f"{result.flop_limit:.2f}x: efficiency {result.efficiency:.2f}, causal {result.causal_efficiency:.2f}",
            flush=True,
        )
    return found


def main() -> None:
    """Measure all families."""
    args = arguments(__doc__, rounds=3)
    families = {family: measure(family, args) for family in FAMILIES}
    results: dict[str, Any] = {"families": families}
    for kind in ("efficiency", "causal_efficiency"):
        results[f"pooled_{kind}"] = {
            str(keep): geometric_mean([found[str(keep)][kind] for found in families.values()]) for keep in KEEP
        }
        print("pooled", kind, results[f"pooled_{kind}"], flush=True)
    save("prefill_efficiency", results, args)


if __name__ == "__main__":
    main()
