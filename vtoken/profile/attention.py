# SPDX-License-Identifier: Apache-2.0
"""Which attention backend makes the unpruned model fastest: the only fair thing to compare with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers.utils import is_flash_attn_2_available

from vtoken.profile.clock import now
from vtoken.profile.spread import alternate

HALF = (torch.float16, torch.bfloat16)


def available_attention(model: nn.Module) -> list[str]:
    """Backends that this model can run here."""
    weight = next(model.parameters())
    flash = weight.device.type == "cuda" and weight.dtype in HALF and is_flash_attn_2_available()
    return ["sdpa", *(["flash_attention_2"] if flash else []), "eager"]


def fastest_attention(
    model: nn.Module, inputs: Mapping[str, Any], rounds: int = 2, step: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Milliseconds of an unpruned forward pass by backend (median); ``step`` is called after each pass."""

    def once(name: str) -> float:
        model.set_attn_implementation(name)  # type: ignore[operator]
        start = now(model)
        model(**inputs, use_cache=True, logits_to_keep=1)
        return (now(model) - start) * 1e3

    found = alternate({name: partial(once, name) for name in available_attention(model)}, rounds, step=step)
    return {name: median(times) for name, times in found.items()}
