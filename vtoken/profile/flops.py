# SPDX-License-Identifier: Apache-2.0
"""Counted operations of a prefill, by torch's own counter, and how many of them a causal kernel leaves out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from vtoken.profile.clock import vision_modules
from vtoken.profile.run import decisions


class Flops(NamedTuple):
    """Multiplications and additions: as torch counts them, and without the future keys that causal kernels skip."""

    counted: int
    causal: int


def prefill_flops(model: nn.Module, inputs: Mapping[str, Any]) -> Flops:
    """Operations of a forward pass without the vision tower, the projector and the selection.

    torch's counter takes all attention for complete. A kernel that is told ``is_causal`` computes about half of it, and
    a long prompt gains more from that than a short one: only `Flops.causal` is a limit that a pruned prefill can reach.
    """
    skipped: list[int] = []
    counter = flop_counter(skipped)
    counts: list[int] = []
    handles = []
    for module in vision_modules(model):
        before: list[int] = []
        handles += [
            module.register_forward_pre_hook(lambda *_, b=before: b.append(counter.get_total_flops())),
            module.register_forward_hook(lambda *_, b=before: counts.append(counter.get_total_flops() - b.pop())),
        ]
    try:
        with counter, decisions(model, counter.get_total_flops) as selection:
            model(**inputs, use_cache=True, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    counted = int(counter.get_total_flops() - sum(counts) - selection())
    return Flops(counted, counted - sum(skipped))


def flop_counter(skipped: list[int] | None = None) -> FlopCounterMode:
    """torch's counter, with attention on CPUs; ``skipped`` collects what causal kernels leave out of its count."""
    noted: list[int] = [] if skipped is None else skipped
    forward = {op for op in flop_registry if "scaled_dot_product" in str(op) and "backward" not in str(op)}
    watched = {op: _counting(op, noted) for op in forward | {_ON_CPU}}
    return FlopCounterMode(display=False, depth=None, custom_mapping=watched)  # type: ignore[arg-type]


_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch 2.14 does not count it


def _counting(op: Any, skipped: list[int]) -> Callable[..., int]:
    """torch's count of an attention operator; notes what it does not compute of a causal square."""
    names = [argument.name for argument in op.default._schema.arguments]

    def count(*args: Any, **kwargs: Any) -> int:
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        full = sdpa_flop_count(*(call[name].shape for name in ("query", "key", "value")))
        if call.get("is_causal"):
            queries, keys = call["query"].shape[-2], call["key"].shape[-2]
            skipped.append(full - full * (queries + 1) // (2 * keys))
        return full

    count._get_raw = True  # type: ignore[attr-defined]  # torch hands tensors to such a formula, not shapes
    return count
