# SPDX-License-Identifier: Apache-2.0
"""What the training of gates and of scorers shares: a small part learns beside a model that stays frozen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.adapters import adapter_for
from vtoken.training.examples import Batch, Source, collate
from vtoken.training.loop import Plan, Report, descend


def train_beside(
    model: nn.Module,
    processor: Any,
    source: Source,
    part: nn.Module,
    loss_of: Callable[[int, Batch], tuple[Tensor, dict[str, float]]],
    plan: Plan,
    out: Path,
    about: Mapping[str, object],
    report: Report | None = None,
) -> list[float]:
    """Train ``part`` on batches of ``source``, on the device of the model's decoder.

    Parameters
    ----------
    model : nn.Module
        An unwrapped model that `vtoken.adapters` knows; it is not changed.
    processor, source
        Where batches come from.
    part : nn.Module
        What is trained.
    loss_of : callable
        ``loss_of(step, batch)`` -> loss and numbers to report.
    plan, out, about, report
        As in `vtoken.training.loop.descend`.

    Returns
    -------
    list of float
        Loss of every step that was done now.
    """
    device = adapter_for(model).language_model.device

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        return loss_of(step, collate(processor, source.draw(step, plan.batch_size), device))

    return descend(part.to(device), loss_at, plan, out, about, report)


@contextlib.contextmanager
def initial_weights(seed: int) -> Iterator[None]:
    """Weights that are made in here depend on the seed alone, and the random numbers outside stay as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
