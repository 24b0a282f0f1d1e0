# SPDX-License-Identifier: Apache-2.0
"""``vtoken train-scorer``: the relevance scorer of the reducer ``explain`` for a frozen model."""

from __future__ import annotations

from pathlib import Path

from vtoken.cli.training import BatchSize, Data, Fresh, Model, Out, Rate, Seed, Steps, train_part


def train_scorer_command(
    model: Model = "mini-llava",
    data: Data = None,
    out: Out = Path("scorer.safetensors"),
    steps: Steps = 300,
    batch_size: BatchSize = 16,
    lr: Rate = 3e-3,
    seed: Seed = 0,
    fresh: Fresh = False,
) -> None:
    """Train the network that predicts relevance (arXiv 2506.01097) for a frozen model."""
    from vtoken.training import train_scorer

    use = "reducer explain, checkpoint={}"
    train_part(train_scorer, use, model, data, out, fresh, steps=steps, batch_size=batch_size, lr=lr, seed=seed)
