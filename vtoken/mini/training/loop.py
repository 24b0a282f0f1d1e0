# SPDX-License-Identifier: Apache-2.0
"""Optimizer, learning-rate schedule, time limit and progress of a training phase."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from vtoken.mini.training.answering import Answers
from vtoken.mini.training.batches import Pack


class Trainer:
    """AdamW with warm-up and cosine decay to a twentieth of the learning rate.

    Parameters
    ----------
    groups : sequence of (parameters, float)
        What is trained, with its learning rate.
    horizon : int
        Steps of the schedule.
    warmup : int
        Steps until the full rate.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[nn.Parameter], float]], horizon: int, warmup: int = 100) -> None:
        self.horizon, self.warmup = horizon, warmup
        self.parameters = [p for parameters, _ in groups for p in parameters]
        options = []
        for parameters, rate in groups:
            for decays in (True, False):  # no decay of biases and norms
                chosen = [p for p in parameters if (p.dim() >= 2) is decays]
                options.append({"params": chosen, "rate": rate, "weight_decay": 0.02 if decays else 0.0})
        self.optimizer = torch.optim.AdamW(options, lr=1.0, betas=(0.9, 0.98), fused=True)

    def step(self, step: int, loss: torch.Tensor) -> None:
        """Follow the gradient of ``loss``."""
        done = min(step / self.horizon, 1.0)
        scale = min((step + 1) / self.warmup, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * scale
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()


def steps(limit: int, minutes: float) -> Iterator[int]:
    """0, 1, ... until ``limit`` steps or ``minutes`` have passed."""
    start = time.time()
    for step in range(limit):
        if time.time() - start > minutes * 60:
            return
        yield step


class Meter:
    """Loss and exact-answer rate by question kind, averaged since the last report."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.right: dict[str, int] = defaultdict(int)
        self.total: dict[str, int] = defaultdict(int)
        self.losses: list[tuple[float, float]] = []

    def add(self, answers: Answers, pack: Pack) -> None:
        """Count one batch."""
        self.losses.append((answers.loss.item(), answers.grounding.item()))
        asked = pack.labels[:, 1:] != -100
        most = max(map(len, pack.kinds)) + 1
        wrong = torch.zeros(len(pack.kinds), most, dtype=torch.long)
        missed = torch.zeros_like(pack.block[:, 1:]).masked_scatter(asked, (~answers.correct).long())
        wrong.scatter_add_(1, pack.block[:, 1:], missed)
        for row, kinds in zip((wrong[:, 1:] == 0).tolist(), pack.kinds, strict=True):
            for ok, kind in zip(row, kinds, strict=False):
                self.right[kind] += ok
                self.total[kind] += 1

    def report(self) -> str:
        """One line; starts over."""
        kinds = " ".join(f"{k[:4]} {self.right[k] / self.total[k]:.2f}" for k in sorted(self.total) if self.total[k])
        loss, grounding = (sum(values) / len(values) for values in zip(*self.losses, strict=True))
        self.reset()
        return f"loss {loss:.3f} ground {grounding:.2f} | {kinds}"
