# SPDX-License-Identifier: Apache-2.0
"""The trained gate of DyVTE (arXiv 2411.19628): its architecture and its checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vtoken import checkpoints


def gate_logits(summary: Tensor, down: Tensor, out: Tensor) -> Tensor:
    """(B, 2): ``Linear -> GELU -> Linear``, both without bias; the second logit speaks for the exit.

    Parameters
    ----------
    summary : Tensor
        (B, 2 D): see `vtoken.reducers.exits.question_summary`.
    down : Tensor
        (hidden, 2 D).
    out : Tensor
        (2, hidden).
    """
    return functional.linear(functional.gelu(functional.linear(summary, down)), out)


def gate_says_exit(summary: Tensor, gates: dict[str, Tensor], layer: int) -> Tensor:
    """(B,) bool: whether the gate of ``layer`` wants to leave; False where it has none.

    Raises
    ------
    ValueError
        If the gate was trained for another width.
    """
    if f"{layer}.0.weight" not in gates:
        return torch.zeros(len(summary), dtype=torch.bool, device=summary.device)
    down, out = (gates[f"{layer}.{part}.weight"].to(summary) for part in (0, 2))
    if down.shape[1] != summary.shape[1]:
        raise ValueError(
            f"The gate of layer {layer} takes {down.shape[1]} numbers, but this model gives {summary.shape[1]}: it was "
            "trained for another model."
        )
    logits = gate_logits(summary, down, out)
    return logits[:, 0] < logits[:, 1]


def load_gates(source: str) -> dict[str, Tensor]:
    """Read ``{layer}.0.weight`` (hidden, 2 D) and ``{layer}.2.weight`` (2, hidden) of every layer with a gate.

    Parameters
    ----------
    source : str
        As `vtoken.checkpoints.load` takes it.

    Raises
    ------
    ValueError
        If there is no such file, or it holds no gate.
    """
    found = checkpoints.load(source, "gate").tensors
    layers = [name.removesuffix(".0.weight") for name in found if name.endswith(".0.weight")]
    for layer in layers:
        down, out = found[f"{layer}.0.weight"], found.get(f"{layer}.2.weight")
        if out is None or down.dim() != 2 or out.shape != (2, down.shape[0]):
            raise ValueError(
                f"{source!r} holds no gate of layer {layer}: '{layer}.0.weight' must be (hidden, 2 D) and "
                f"'{layer}.2.weight' (2, hidden)."
            )
    if not layers:
        raise ValueError(f"{source!r} holds no gate: it needs tensors named '<layer>.0.weight' and '<layer>.2.weight'.")
    return found
