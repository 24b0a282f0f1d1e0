# SPDX-License-Identifier: Apache-2.0
"""What reading the vision tower costs, as a share of its time; writes benchmarks/results/encoder_scores.json.

The tower runs in turn without any tap and with one statistic of its second-last block each, on the towers of CLIP-L,
SigLIP-so400m and Qwen2.5-VL (of reduced depth on a CPU, where the share is scaled to the full depth too).

    python benchmarks/encoder_scores.py
"""

from __future__ import annotations

from typing import Any

import torch
from harness import arguments, race, save

from vtoken import EncoderRead
from vtoken.adapters import adapter_for
from vtoken.adapters.synthetic import synthetic_inputs
from vtoken.encoder import STATISTICS as FUNCTIONS
from vtoken.engine.encode import encode
from vtoken.engine.tower import VisionReader
from vtoken.profile.memory import peak_bytes
from vtoken.profile.shapes import random_model, shape_config

TOWERS = {"clip-l": "llava-1.5-7b", "siglip-so400m": "llava-onevision-7b", "qwen2.5-vl": "qwen2.5-vl-7b"}
STATISTICS = ("cls", "cls_logits", "received", "given", "keys")
DEPTH = 8
"""Blocks of a tower on a CPU: an eighth of Qwen2.5-VL's attend to the whole picture."""
TOKENS = {"cpu": 576}
"""Visual tokens by device."""
LONG = 16384
"""Patches of one picture, for the memory."""


def tower_model(shape: str, args: Any) -> tuple[Any, int]:
    """The tower of a shape with a decoder of one thin layer, and the depth that the tower really has."""
    config = shape_config(shape)
    vision, text = config.vision_config, config.text_config
    name = "depth" if hasattr(vision, "depth") else "num_hidden_layers"
    full = getattr(vision, name)
    text.num_hidden_layers, text.intermediate_size = 1, 64
    text.hidden_size, text.num_attention_heads, text.num_key_value_heads = 128, 1, 1
    if hasattr(vision, "out_hidden_size"):
        vision.out_hidden_size = text.hidden_size
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    if args.quick:
        vision.hidden_size, vision.intermediate_size = 64, 64
        setattr(vision, "num_heads" if hasattr(vision, "num_heads") else "num_attention_heads", 2)
    if args.device == "cpu":
        setattr(vision, name, 3 if args.quick else DEPTH)
        if hasattr(vision, "fullatt_block_indexes"):
            vision.fullatt_block_indexes = [1 if args.quick else DEPTH - 2]
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    return random_model(config, device=args.device, dtype=dtype), full


def measure(tower: str, args: Any) -> dict[str, Any]:
    """Times of the tower alone and with each statistic."""
    model, full = tower_model(TOWERS[tower], args)
    adapter = adapter_for(model)
    inputs = synthetic_inputs(model, 1, 64 if args.quick else TOKENS.get(args.device, 1024))
    wanted = [what for what in STATISTICS if adapter.leading_tokens or not what.startswith("cls")]
    readers = {"nothing": VisionReader(adapter, (), False)}
    readers |= {what: VisionReader(adapter, (EncoderRead(what),), False) for what in wanted}
    with torch.inference_mode():
        runs = {what: lambda reader=reader: encode(adapter, reader, inputs) for what, reader in readers.items()}
        times = race(runs, args.rounds, args.device)
    depth = len(adapter.tower_blocks)
    base = times["nothing"]["median"]
    for what in wanted:
        extra = times[what]["median"] - base
        times[what]["share"] = extra / base
        times[what]["share_of_full_depth"] = extra / (base * full / depth)
        print(
            f"{tower:14} {what:11} {extra:7.2f} ms of {base:.1f} ms, {times[what]['share_of_full_depth']:+.1%} of {full} blocks"  # noqa: E501
        )
    return {"blocks": depth, "full_blocks": full, "tokens": int(inputs["input_ids"].shape[1]), "times": times}


def long_picture(args: Any) -> dict[str, int]:
    """Peak memory of received attention over many patches, and what one head's N x N matrix would take."""
    patches = 1024 if args.quick else LONG
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, patches, 64, generator=generator).to(args.device) for _ in range(2))
    peak = peak_bytes(lambda: FUNCTIONS["received"](query, key, 0.125, 0), query.device)
    print(f"received attention of {patches} patches: {peak / 2**20:.0f} MiB at most", flush=True)
    return {"patches": patches, "peak_bytes": peak, "full_matrix_bytes": patches**2 * 4}


def main() -> None:
    """Measure all towers, then the memory."""
    args = arguments(__doc__, rounds=3)
    towers = {tower: measure(tower, args) for tower in TOWERS}
    save("encoder_scores", {"towers": towers, "long": long_picture(args)}, args)


if __name__ == "__main__":
    main()
