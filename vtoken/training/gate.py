# SPDX-License-Identifier: Apache-2.0
"""Trains the gates of DyVTE (arXiv 2411.19628) on a frozen model, as its authors do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vtoken.adapters import adapter_for
from vtoken.context import VisualContext
from vtoken.observe import Observe
from vtoken.reducers.checks import check_count
from vtoken.reducers.exits import question_summary
from vtoken.reducers.vtw import VTW
from vtoken.training.beside import initial_weights, train_beside
from vtoken.training.examples import IGNORED, Batch, Source
from vtoken.training.loop import Plan, Report
from vtoken.wrapping import reduce

HIDDEN = 2048  # of the authors
PLAN = Plan(steps=52, batch_size=128, lr=4e-5)
"""The authors': one epoch over 1 % of LLaVA-665k, 16 x 8 examples an update."""
SLACK = 1.03  # how much larger the loss without visual tokens may be
AGREEMENT = 0.99  # share of the answer's tokens that must stay the same


def train_gate(
    model: nn.Module,
    processor: Any,
    source: Source,
    out: Path,
    *,
    plan: Plan = PLAN,
    hidden: int = HIDDEN,
    about: Mapping[str, object] | None = None,
    report: Report | None = None,
) -> list[float]:
    """Train one gate a layer and write ``out``, for ``DyVTE(exit="gate", gate=out)``.

    A step takes one random layer for the whole batch and asks its gate, by cross-entropy, whether the answers would be
    the same without visual tokens behind it: more than 99 % of the tokens (argmax) agree and the loss of the reference
    answer grows by less than 3 %. The gate's features are those of the prompt, as in inference.

    Parameters
    ----------
    model : nn.Module
        An unwrapped model that `vtoken.adapters` knows; it is not changed.
    processor : object
        Its processor.
    source : Source
        Where questions and answers come from.
    out : Path
        A ``.safetensors`` file. An unfinished training of the same parameters is gone on with.
    plan : Plan
        Steps, batch size, learning rate and seed.
    hidden : int
        Width of the gates.
    about : mapping, optional
        Further metadata, such as the model's name.
    report : callable, optional
        Called after every step with the loss and the share of examples that may exit.

    Returns
    -------
    list of float
        Loss of each step.

    Raises
    ------
    ValueError
        If a parameter is out of range, or ``out`` holds something else.
    """
    check_count("hidden", hidden)
    width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    depth = len(adapter_for(model).layers)
    gates = make_gates(width, depth, hidden, plan.seed)

    def loss_of(step: int, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        layer = int(np.random.default_rng([plan.seed, step]).integers(depth - 1))
        summary, label = gate_example(model, batch.whole, batch.labels, layer)
        return functional.cross_entropy(gates[str(layer)](summary), label), {"exits": float(label.float().mean())}

    described = {"part": "dyvte gate", "hidden": hidden, "width": width, "depth": depth, **(about or {})}
    return train_beside(model, processor, source, gates, loss_of, plan, out, described, report)


def make_gates(width: int, depth: int, hidden: int, seed: int) -> nn.ModuleDict:
    """An untrained gate for every layer of the decoder but the last one."""
    with initial_weights(seed):
        return nn.ModuleDict(
            {
                str(layer): nn.Sequential(
                    nn.Linear(2 * width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, 2, bias=False)
                )
                for layer in range(depth - 1)
            }
        )


@torch.no_grad()
def gate_example(model: nn.Module, whole: Mapping[str, Any], labels: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Features (B, 2 D) and labels (B,) long, 1 for an exit after ``layer``, of a batch; see `Batch`."""
    seen: list[Tensor] = []

    def see(ctx: VisualContext) -> None:
        length = ctx.text.shape[1]  # of which the gate knows the prompt, it runs before there is an answer
        prompt = torch.arange(length, device=ctx.text.device) <= length - labels.shape[1]
        seen.append(question_summary(replace(ctx, text=ctx.text & prompt)))

    with reduce(model, Observe(see, (layer + 1,))):
        full = answer_logits(model, whole, labels)
    with reduce(model, VTW(layer + 1)):
        blind = answer_logits(model, whole, labels)
    return seen[0], may_exit(full, blind, labels).long()


def answer_logits(model: nn.Module, whole: Mapping[str, Any], labels: Tensor) -> Tensor:
    """(B, A, V): logits of the positions that predict the answers (B, A)."""
    return model(**{**whole, "use_cache": False}).logits[:, -labels.shape[1] :].float()


def may_exit(full: Tensor, blind: Tensor, labels: Tensor) -> Tensor:
    """(B,) bool: whether ``blind`` logits (B, A, V) answer as the ``full`` ones do, by the authors' two conditions."""
    asked = labels != IGNORED
    count = asked.sum(1).clamp(min=1)
    same = ((full.argmax(2) == blind.argmax(2)) & asked).sum(1) / count
    before, after = (
        functional.cross_entropy(x.mT, labels, ignore_index=IGNORED, reduction="none").sum(1) / count
        for x in (full, blind)
    )
    return (same > AGREEMENT) & (after < SLACK * before)
