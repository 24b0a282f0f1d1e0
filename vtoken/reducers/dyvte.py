# SPDX-License-Identifier: Apache-2.0
"""DyVTE: leave all visual tokens behind at the layer where this sample no longer needs them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vtoken.checkpoints import path_of
from vtoken.context import Cut, VisualContext
from vtoken.reducers.base import Reducer
from vtoken.reducers.checks import check_choice, check_count, check_number, check_place, layer_at, places
from vtoken.reducers.exits import contribution, divergence, question_summary
from vtoken.reducers.gate import gate_says_exit, load_gates
from vtoken.reducers.rows import leave, rows_at, text_to_visual
from vtoken.registry import register

THRESHOLDS = {"attention": 0.10, "contribution": 0.10, "convergence": 0.001}
EXITS = (*THRESHOLDS, "gate")
ROWS = {"attention": "question", "contribution": "last"}
STREAK, WITHOUT = "dyvte streak", "dyvte without"
"""Notes: checks passed in a row, and what the next layer makes of the text alone."""


@register("dyvte")
@dataclass(frozen=True)
class DyVTE(Reducer):
    """Dynamic visual-token exit (arXiv 2411.19628), with the published gate or a training-free criterion.

    The gate is trained, one per layer, and its authors publish no weights: ``exit="gate"`` needs a checkpoint, which
    ``vtoken train-gate`` makes. The other exits are proposals of this library, and **none of DyVTE's numbers apply to
    them**; no published thresholds exist for the last two.

    * ``"attention"``: the question's attention to visual tokens is below ``threshold`` (ToDRE's measure, 2505.18757);
    * ``"contribution"``: so is the length of what visual tokens add to the last token's attention output;
    * ``"convergence"``: so is ``1 - cos`` between the gate's features after a layer and those the layer gives without
      visual tokens, for which it runs once more on the text rows.

    Each row of a batch leaves on its own, at most once, and never before ``min_layer``. An exit at a fixed layer,
    calibrated on samples, is `VTW`.

    Parameters
    ----------
    exit : str
        ``"attention"``, ``"contribution"``, ``"convergence"`` or ``"gate"``.
    threshold : float or None
        Of the criterion; None takes 0.1 (attention, contribution) or 0.001 (convergence).
    min_layer : int or float
        No exit before it: a layer number or a share of the depth.
    checks : tuple
        Layers after which the attention is looked at, as numbers or shares of the depth. Other criteria look after
        every layer.
    patience : int
        Checks in a row that must agree.
    gate : str or None
        Checkpoint of the gate: a ``.safetensors`` file, a PyTorch file of tensors, or an embedded model's name.

    Raises
    ------
    ValueError
        If a parameter is out of range, or the gate's file is missing, damaged or does not fit the model.
    """

    summary = "Exit of all visual tokens at a depth that depends on the sample."
    paper = "2411.19628"
    uses_text = True

    exit: str = "attention"
    threshold: float | None = None
    min_layer: int | float = 0.5
    checks: tuple[int | float, ...] = (0.625, 0.75, 0.875)
    patience: int = 1
    gate: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "checks", places("checks", self.checks))
        check_choice("exit", self.exit, EXITS)
        if self.threshold is not None:
            check_number("threshold", self.threshold, 0, 1)
        check_place("min_layer", self.min_layer)
        check_count("patience", self.patience)
        if (self.exit == "gate") != (self.gate is not None):
            raise ValueError(
                f"exit={self.exit!r} and gate={self.gate!r}: a checkpoint goes with exit='gate', only there."
            )

    def _exits(self, depth: int) -> tuple[int, ...]:
        """Layers that may be the first without visual tokens."""
        first = max(1, layer_at(self.min_layer, depth))
        if self.exit != "attention":
            return tuple(range(first, depth))
        after = {min(layer_at(place, depth), depth - 2) + 1 for place in self.checks}
        return tuple(sorted(layer for layer in after if layer >= first and layer > 0))

    def files(self) -> tuple[Path, ...]:
        return (path_of(self.gate, "gate"),) if self.gate else ()

    def layers(self, depth: int) -> tuple[int, ...]:
        exits = self._exits(depth)
        return (exits[0] - 1, *exits) if self.exit == "convergence" and exits else exits

    def taps(self, depth: int) -> dict[int, str]:
        return {layer - 1: ROWS[self.exit] for layer in self._exits(depth)} if self.exit in ROWS else {}

    def at_layer(self, layer: int, ctx: VisualContext) -> Cut | None:
        """Drop every visual token of the rows that have been quiet for ``patience`` checks."""
        notes = {}
        if self.exit == "convergence" and layer + 1 < ctx.depth and ctx.rerun is not None:
            notes[WITHOUT] = question_summary(ctx, ctx.rerun(ctx.text))
        quiet = self._quiet(layer, ctx)
        if quiet is None:
            return Cut(ctx.valid, notes=notes)
        before = ctx.notes.get(STREAK, torch.zeros_like(quiet).long()).to(quiet.device)
        streak = torch.where(quiet, before + 1, 0)
        return replace(leave(ctx, streak >= self.patience), notes={**notes, STREAK: streak})

    def _quiet(self, layer: int, ctx: VisualContext) -> Tensor | None:
        """(B,) bool: rows that no longer needed visual tokens in the layer before; None if that was not looked at."""
        if self.exit == "gate":
            return gate_says_exit(question_summary(ctx), load_gates(str(self.gate)), layer - 1)
        threshold = THRESHOLDS[self.exit] if self.threshold is None else self.threshold
        if self.exit == "attention":
            return text_to_visual(rows_at(ctx, layer - 1), ctx.visual) < threshold
        if self.exit == "contribution":
            return contribution(rows_at(ctx, layer - 1), ctx.visual) < threshold
        without = ctx.notes.get(WITHOUT)  # of the layer before, as every layer from the first check on is asked
        return None if without is None else divergence(ctx, without) < threshold
