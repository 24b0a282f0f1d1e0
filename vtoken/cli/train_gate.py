# SPDX-License-Identifier: Apache-2.0
"""``vtoken train-gate``: the gates of DyVTE for a frozen model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from vtoken.cli.training import BatchSize, Data, Fresh, Model, Out, Rate, Seed, Steps, train_part

Hidden = Annotated[int, typer.Option(help="Width of the gates; 2048 is the authors'.")]


def train_gate_command(
    model: Model = "mini-llava",
    data: Data = None,
    out: Out = Path("gate.safetensors"),
    steps: Steps = 52,
    batch_size: BatchSize = 128,
    lr: Rate = 4e-5,
    hidden: Hidden = 2048,
    seed: Seed = 0,
    fresh: Fresh = False,
) -> None:
    """Train the gates of DyVTE (arXiv 2411.19628) for a frozen model; the defaults are the authors'."""
    from vtoken.training import train_gate

    train, use = functools.partial(train_gate, hidden=hidden), "reducer dyvte, exit='gate', gate={}"
    train_part(train, use, model, data, out, fresh, steps=steps, batch_size=batch_size, lr=lr, seed=seed)
