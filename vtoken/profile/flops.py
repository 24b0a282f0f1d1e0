# SPDX-License-Identifier: Apache-2.0
"""Counted operations of a prefill, by torch's own counter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vtoken.profile.clock import vision_modules
from vtoken.profile.run import decisions


def prefill_flops(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """Multiplications and additions of a forward pass without the vision tower, the projector and the selection.

    Attention counts as if it were not causal, as the counter does for every backend.
    """
    counter = FlopCounterMode(display=False, depth=None)  # type: ignore[arg-type]
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
    return int(counter.get_total_flops() - sum(counts) - selection())
