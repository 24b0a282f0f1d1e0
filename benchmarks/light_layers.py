# SPDX-License-Identifier: Apache-2.0
"""Time and operations that light layers save in a prefill; writes benchmarks/results/light_layers.json.

Stock classes with random weights in the token layout of LLaVA-NeXT, at full size on a GPU and with a decoder of 8
layers of width 1024 on a CPU: what a layer computes does not depend on the weights. Half of the heads are called
inactive, without calibration.

    python benchmarks/light_layers.py
"""

from __future__ import annotations

import torch
from harness import arguments, save

import vtoken
from vtoken.adapters.synthetic import synthetic_inputs
from vtoken.profile import profile
from vtoken.profile.attention import fastest_attention
from vtoken.profile.shapes import random_model, shape_config

TOKENS = 1152


def reducers(layers: int, heads: int) -> dict[str, vtoken.Reducer]:
    """Each pruning alone, and what is used together."""
    half = tuple(tuple(head % 2 == 0 for head in range(heads)) for _ in range(layers))
    nothing = vtoken.YOPO(window=None, ffn=1.0, drop_layer=None).config()
    return {
        "ima, ffn": vtoken.IMA(skip="ffn"),
        "ima, attention": vtoken.IMA(skip="attention"),
        "ima, block": vtoken.IMA(skip="block"),
        "yopo, window alone": vtoken.get_reducer({**nothing, "window": 5}),
        "yopo, ffn alone": vtoken.get_reducer({**nothing, "ffn": 0.5}),
        "yopo, heads alone": vtoken.get_reducer({**nothing, "heads": half}),
        "yopo": vtoken.YOPO(),
        "random > yopo": vtoken.Chain([vtoken.Random(keep=0.5), vtoken.YOPO()]),
    }


def main() -> None:
    """Measure every reducer."""
    args = arguments(__doc__, rounds=3)
    gpu = args.device != "cpu"
    config = shape_config(f"llava-next-{'7b' if gpu else 'small'}")
    text = config.text_config
    if args.quick:
        text.num_hidden_layers = 4
    model = random_model(config, device=args.device, dtype=torch.bfloat16 if gpu else torch.float32)
    inputs = synthetic_inputs(model, 1, 256 if args.quick else TOKENS)
    with torch.inference_mode():
        candidates = fastest_attention(model, inputs)
    found = {}
    for name, reducer in reducers(text.num_hidden_layers, text.num_attention_heads).items():
        result = profile(model, reducer, inputs, new_tokens=2, rounds=args.rounds, candidates=candidates)
        found[name] = {"reducer": str(reducer), **result.as_dict()}
        print(f"{name:20} {result.speedup('prefill'):.2f}x of {result.flop_limit:.2f}x", flush=True)
    save("light_layers", found, args)


if __name__ == "__main__":
    main()
