# SPDX-License-Identifier: Apache-2.0
"""Gradient descent on a small part that can be stopped and gone on with."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vtoken import checkpoints
from vtoken.reducers.checks import check_count, check_number

SAVED_EVERY = 25  # steps

Report = Callable[[int, Mapping[str, float]], None]
"""``report(step, numbers)`` after every step, counted from 1."""


@dataclass(frozen=True)
class Plan:
    """How long and how fast.

    Parameters
    ----------
    steps : int
        Updates.
    batch_size : int
        Examples an update.
    lr : float
        AdamW's learning rate at the beginning; it falls to 0 on a cosine.
    seed : int
        Of initial weights and random choices.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    steps: int
    batch_size: int
    lr: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_count("batch_size", self.batch_size)
        check_number("lr", self.lr, 0, above=True)
        check_count("seed", self.seed, least=0)


def descend(
    part: nn.Module,
    loss_at: Callable[[int], tuple[Tensor, dict[str, float]]],
    plan: Plan,
    path: Path,
    about: Mapping[str, object],
    report: Report | None = None,
) -> list[float]:
    """Train ``part``, and keep its state dict in a checkpoint as it goes.

    A checkpoint of the same training that is not finished is gone on with; the result is that of an uninterrupted one.

    Parameters
    ----------
    part : nn.Module
        What is trained.
    loss_at : callable
        ``loss_at(step)`` -> loss and numbers to report.
    plan : Plan
        Its numbers are part of what makes a training the same.
    path : Path
        A ``.safetensors`` file; ``.state`` beside it is what an unfinished training goes on from.
    about : mapping
        Metadata of the checkpoint.

    Returns
    -------
    list of float
        Loss of every step that was done now.

    Raises
    ------
    ValueError
        If the checkpoint is finished, or of another training, or its state is damaged.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"out={str(path)!r}: checkpoints are written as .safetensors, give such a name.")
    about = {**about, "batch_size": plan.batch_size, "lr": plan.lr, "seed": plan.seed, "steps": plan.steps}
    optimizer = torch.optim.AdamW(part.parameters(), lr=plan.lr)
    state = path.with_name(f"{path.name}.state")
    done, losses = _resume(part, optimizer, path, state, about), list[float]()
    while done < plan.steps:
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * 0.5 * (1 + math.cos(math.pi * done / plan.steps))
        loss, numbers = loss_at(done)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        done += 1
        if done % SAVED_EVERY == 0 or done == plan.steps:
            checkpoints.save(path, part.state_dict(), {**about, "done": done})
            _keep(state, {"about": about, "done": done, "part": part.state_dict(), "optimizer": optimizer.state_dict()})
        if report is not None:
            report(done, {"loss": losses[-1], **numbers})
    state.unlink(missing_ok=True)
    return losses


def _keep(path: Path, state: Mapping[str, object]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save(state, part)
    os.replace(part, path)


def _resume(
    part: nn.Module, optimizer: torch.optim.Optimizer, path: Path, state: Path, about: Mapping[str, object]
) -> int:
    """Load what an unfinished training left; returns the steps done."""
    if not state.is_file():
        if path.is_file():
            raise ValueError(f"{str(path)!r} is there already: start over with --fresh, or give another file.")
        return 0
    try:
        found = torch.load(state, map_location="cpu", weights_only=True)
        before, done = found["about"], int(found["done"])
    except Exception as error:  # zip, pickle and torch raise types of their own
        raise ValueError(
            f"{str(state)!r} is damaged ({type(error).__name__}): the training cannot go on, start over with --fresh."
        ) from None
    for name, value in about.items():
        if before.get(name) != value:
            raise ValueError(
                f"{str(path)!r} is of another training ({name} {before.get(name)}, now {value}): start over with "
                "--fresh, or give another file."
            )
    part.load_state_dict(found["part"])
    optimizer.load_state_dict(found["optimizer"])
    return done


def discard(path: Path) -> None:
    """Delete a checkpoint and its state, so that the training starts over."""
    for file in (path, path.with_name(f"{path.name}.state")):
        file.unlink(missing_ok=True)
