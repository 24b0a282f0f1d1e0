# SPDX-License-Identifier: Apache-2.0
"""Which attention kernels really run in the decoder: what torch dispatches, not what a configuration names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vtoken.adapters import Adapter
from vtoken.doctor.outcome import Outcome
from vtoken.doctor.probes import Places
from vtoken.doctor.prompts import Prompts
from vtoken.doctor.runs import Inputs, hooked, steps
from vtoken.wrapping import reduce

FUSED = ("flash", "efficient_attention", "cudnn_attention", "fused_attention", "flex_attention")
"""What operators that compute attention in one kernel have in their names."""


class _Operators(TorchDispatchMode):
    """Notes the attention kernels dispatched while the decoder is open, by the number of rows that it works on."""

    def __init__(self) -> None:
        super().__init__()
        self.open: str | None = None
        self.seen: dict[str, set[str]] = {"prefill": set(), "decode": set()}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = str(func).lower()
        if self.open and any(part in name for part in FUSED):
            self.seen[self.open].add(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def kernels(model: Any, adapter: Adapter, prompts: Prompts) -> Outcome:
    """Is FlashAttention in use, unpruned and pruned, in prefill and decoding?"""
    asked = getattr(adapter.language_model.config, "_attn_implementation", None) or "the default"
    plain = _running(model, adapter, prompts.first)
    with reduce(model, Places()):
        pruned = _running(model, adapter, prompts.first)
    parts = []
    for phase in ("prefill", "decode"):
        before, after = (", ".join(sorted(seen[phase])) or "no fused kernel" for seen in (plain, pruned))
        parts.append(f"{phase}: {before}" if before == after else f"{phase}: {before}, pruned {after}")
    flash = {phase: any("flash" in name for name in pruned[phase]) for phase in pruned}
    text = f"{asked} asked for; {'; '.join(parts)}"
    numbers = {f"flash in {phase}": float(used) for phase, used in flash.items()}
    if "flash" in asked and not flash["prefill"]:
        return Outcome("failed", f"FlashAttention is asked for and does not run in a pruned prefill: {text}.", numbers)
    return Outcome("passed", f"{text}.", numbers)


def _running(model: Any, adapter: Adapter, inputs: Inputs) -> dict[str, set[str]]:
    """Kernels of the decoder by phase, of an answer of two tokens."""
    noted = _Operators()

    def enter(module: nn.Module, args: tuple, kwargs: Inputs) -> None:
        given = kwargs.get("inputs_embeds", kwargs.get("input_ids", args[0] if args else None))
        noted.open = "prefill" if given is not None and given.shape[1] > 1 else "decode"

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        noted.open = None

    language = adapter.language_model
    handles = [language.register_forward_pre_hook(enter, with_kwargs=True), language.register_forward_hook(leave)]
    # an inference mode would show `scaled_dot_product_attention` alone, not the kernel that it chooses
    with torch.inference_mode(False), torch.no_grad(), hooked(handles), noted:
        steps(model, inputs, 2, [])
    return noted.seen
