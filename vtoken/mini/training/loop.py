# SPDX-License-Identifier: Apache-2.0
"""Optimizer, learning-rate schedule, time limit and progress of a training phase."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from vtoken.mini.questions import KINDS
from vtoken.mini.training.answering import Answers
from vtoken.mini.training.batches import Pack


class Trainer:
    """AdamW with warm-up and cosine decay to a twentieth of the learning rate.

    Parameters
    ----------
    modules : mapping of nn.Module to float
        What is trained, each with its learning rate.
    horizon : int
        Steps of the schedule.
    warmup : int
        Steps until the full rate.
    """

    def __init__(self, modules: Mapping[nn.Module, float], horizon: int, warmup: int = 100) -> None:
        self.horizon, self.warmup = horizon, warmup
        self.parameters = [p for module in modules for p in module.parameters()]
        groups = []
        for module, rate in modules.items():
            for decays in (True, False):  # no decay of biases and norms
                chosen = [p for p in module.parameters() if (p.dim() >= 2) is decays]
                groups.append({"params": chosen, "rate": rate, "weight_decay": 0.02 if decays else 0.0})
        self.optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98), fused=True)

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
        wrong = torch.zeros(pack.labels.shape, dtype=torch.bool)
        asked = pack.labels[:, 1:] != -100
        wrong[:, 1:][asked] = ~answers.correct
        exact = ~wrong.view(len(pack.kinds), -1, pack.length).any(-1)
        for row, kinds in zip(exact.tolist(), pack.kinds, strict=True):
            for ok, kind in zip(row, kinds, strict=False):
                self.right[kind] += ok
                self.total[kind] += 1

    def report(self) -> str:
        """One line; starts over."""
        kinds = " ".join(f"{k[:4]} {self.right[k] / self.total[k]:.2f}" for k in KINDS if self.total[k])
        loss, grounding = (sum(values) / len(values) for values in zip(*self.losses, strict=True))
        self.reset()
        return f"loss {loss:.3f} ground {grounding:.2f} | {kinds}"
