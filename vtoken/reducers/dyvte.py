# SPDX-License-Identifier: Apache-2.0
"""DyVTE: leave all visual tokens behind at the layer where this sample no longer needs them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from vtoken.context import Cut, VisualContext
from vtoken.reducers.base import Reducer
from vtoken.reducers.checks import check_choice, check_count, check_number, check_place, layer_at, places
from vtoken.reducers.rows import leave, question_rows, rows_at, text_to_visual
from vtoken.registry import register
from vtoken.sequence import gather

EXITS = ("attention", "gate")


@register("dyvte")
@dataclass(frozen=True)
class DyVTE(Reducer):
    """Dynamic visual-token exit (arXiv 2411.19628), with the published gate or a training-free criterion.

    The gate is trained, one per layer, and its authors publish no weights: ``exit="gate"`` needs a checkpoint of
    yours. ``exit="attention"`` is this library's own stand-in and none of DyVTE's numbers apply to it: leave once the
    share of the question's attention that goes to visual tokens is below ``threshold``. Each row of a batch leaves on
    its own, at most once, and never before ``min_layer``. The fixed exit is `VTW`.

    Parameters
    ----------
    exit : str
        ``"attention"`` or ``"gate"``.
    threshold : float
        Of the attention share.
    min_layer : int or float
        No exit before it: a layer number or a share of the depth.
    checks : tuple
        Layers after which the attention is looked at, as numbers or shares of the depth. The gate is asked after
        every layer.
    patience : int
        Checks in a row that must agree.
    gate : str or None
        Checkpoint (``.safetensors``, or a PyTorch file of tensors) with ``{layer}.0.weight`` (hidden, 2 D) and
        ``{layer}.2.weight`` (2, hidden) for every layer that has a gate.

    Raises
    ------
    ValueError
        If a parameter is out of range, or the gate's file is missing or does not fit the model.
    """

    summary = "Exit of all visual tokens at a depth that depends on the sample."
    paper = "2411.19628"
    uses_text = True

    exit: str = "attention"
    threshold: float = 0.10
    min_layer: int | float = 0.5
    checks: tuple[int | float, ...] = (0.625, 0.75, 0.875)
    patience: int = 1
    gate: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "checks", places("checks", self.checks))
        check_choice("exit", self.exit, EXITS)
        check_number("threshold", self.threshold, 0, 1)
        check_place("min_layer", self.min_layer)
        check_count("patience", self.patience)
        if (self.exit == "gate") != (self.gate is not None):
            raise ValueError(
                f"exit={self.exit!r} and gate={self.gate!r}: a checkpoint goes with exit='gate', only there."
            )

    def layers(self, depth: int) -> tuple[int, ...]:
        first = max(1, layer_at(self.min_layer, depth))
        if self.exit == "gate":
            return tuple(range(first, depth))
        after = {min(layer_at(place, depth), depth - 2) + 1 for place in self.checks}
        return tuple(sorted(layer for layer in after if layer >= first and layer > 0))

    def taps(self, depth: int) -> dict[int, str]:
        return {layer - 1: "question" for layer in self.layers(depth)} if self.exit == "attention" else {}

    def at_layer(self, layer: int, ctx: VisualContext) -> Cut | None:
        """Drop every visual token of the rows that have been quiet for ``patience`` checks."""
        if self.exit == "gate":
            quiet = gate_says_exit(question_summary(ctx), load_gate(str(self.gate)), layer - 1)
        else:
            quiet = text_to_visual(rows_at(ctx, layer - 1), ctx.visual) < self.threshold
        streak = torch.where(quiet, ctx.scratch.get("dyvte", torch.zeros_like(quiet).long()).to(quiet.device) + 1, 0)
        ctx.scratch["dyvte"] = streak
        return leave(ctx, streak >= self.patience)


def question_summary(ctx: VisualContext) -> Tensor:
    """(B, 2 D): mean of the text states behind the image without the last one, and the last one."""
    index, valid = question_rows(ctx)
    states = gather(ctx.hidden.float(), index)  # right aligned: the last one is the last text token
    rest = states[:, :-1] * valid[:, :-1, None]
    mean = rest.sum(1) / valid[:, :-1].sum(1, keepdim=True).clamp(min=1)
    return torch.cat([mean, states[:, -1]], 1)


def gate_says_exit(summary: Tensor, gates: dict[str, Tensor], layer: int) -> Tensor:
    """(B,) bool: ``Linear -> GELU -> Linear`` on the summary (B, 2 D); exit if the second logit is larger.

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
    logits = functional.linear(functional.gelu(functional.linear(summary, down)), out)
    return logits[:, 0] < logits[:, 1]


@functools.lru_cache(maxsize=4)
def load_gate(path: str) -> dict[str, Tensor]:
    """Read a gate checkpoint.

    Raises
    ------
    ValueError
        If there is no such file or it holds no gate.
    """
    if not Path(path).is_file():
        raise ValueError(f"There is no gate checkpoint {path!r}: train one, or use exit='attention'.")
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        found = load_file(path)
    else:
        found = torch.load(path, map_location="cpu", weights_only=True)
    if not any(str(name).endswith(".0.weight") for name in found):
        raise ValueError(f"{path!r} holds no gate: it needs tensors named '<layer>.0.weight' and '<layer>.2.weight'.")
    return found
