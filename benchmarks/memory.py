# SPDX-License-Identifier: Apache-2.0
"""What a prefill holds: bytes of the KV cache, and the most that the decoder has alive; benchmarks/results/memory.json.

Nothing is computed from token counts: the cache's tensors are summed, and storages are followed from the operation that
makes them until the last reference is gone. Reducers that drop inside the decoder store fewer columns from there on.

    python benchmarks/memory.py
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from harness import arguments, save
from torch import nn

import vtoken
from vtoken.adapters import adapter_for
from vtoken.adapters.synthetic import synthetic_inputs
from vtoken.engine.cache import cache_bytes, stored_length
from vtoken.profile.memory import LiveBytes
from vtoken.profile.shapes import random_model, shape_config

TOKENS = 2304
REDUCERS = {
    "random keep=0.25": vtoken.Random(keep=0.25),
    "random keep=0.1": vtoken.Random(keep=0.1),
    "fastv keep=0.1": vtoken.FastV(keep=0.1, layer=2),
    "pyramiddrop": vtoken.PyramidDrop(),
    "vtw": vtoken.VTW(),
    "random keep=0.25 > vtw": vtoken.Chain([vtoken.Random(keep=0.25), vtoken.VTW()]),
}


@contextlib.contextmanager
def watched(module: nn.Module) -> Iterator[LiveBytes]:
    """Follows what is alive while the module runs, beyond what it was given."""
    tracker, stack = LiveBytes(), contextlib.ExitStack()

    def begin(*_: Any) -> None:
        stack.enter_context(tracker)

    def end(*_: Any) -> None:
        stack.close()

    handles = [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        yield tracker
    finally:
        stack.close()
        for handle in handles:
            handle.remove()


def measure(model: Any, reducer: vtoken.Reducer | None, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Bytes of one prefill, and the columns that each layer stores."""
    wrapped = contextlib.nullcontext() if reducer is None else vtoken.reduce(model, reducer)
    with torch.inference_mode(), wrapped, watched(adapter_for(model).language_model) as tracker:
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    columns = [stored_length(cache, layer) for layer in range(len(cache.layers))]
    return {"kv_bytes": cache_bytes(cache), "peak_bytes": tracker.peak, "columns": columns}


def main() -> None:
    """Measure the unpruned model, then every reducer."""
    args = arguments(__doc__)
    config = shape_config("llava-next-small")
    if args.quick:
        config.text_config.hidden_size, config.text_config.intermediate_size = 128, 256
    model = random_model(config, device=args.device)
    inputs = synthetic_inputs(model, 1, TOKENS)
    results: dict[str, Any] = {}
    for name, reducer in {"unpruned": None, **REDUCERS}.items():
        results[name] = found = measure(model, reducer, inputs)
        kv, peak = (found[key] / results["unpruned"][key] for key in ("kv_bytes", "peak_bytes"))
        print(f"{name:24} KV {found['kv_bytes'] / 2**20:6.1f} MiB ({kv:.3f}), decoder at most {peak:.3f}", flush=True)
    save("memory", results, args)


if __name__ == "__main__":
    main()
