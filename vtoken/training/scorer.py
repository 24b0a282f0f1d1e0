# SPDX-License-Identifier: Apache-2.0
"""Trains the network that predicts relevance from the first decoder layer's attention (arXiv 2506.01097)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.adapters import adapter_for
from vtoken.context import VisualContext
from vtoken.explain import relevance
from vtoken.observe import Observe
from vtoken.reducers.checks import check_count
from vtoken.reducers.explain import first_layer_maps, predict
from vtoken.training.beside import initial_weights, train_beside
from vtoken.training.examples import Batch, Source
from vtoken.training.loop import Plan, Report
from vtoken.wrapping import reduce

PLAN = Plan(steps=300, batch_size=16, lr=3e-3)
CHANNELS = 16


def train_scorer(
    model: nn.Module,
    processor: Any,
    source: Source,
    out: Path,
    *,
    plan: Plan = PLAN,
    channels: int = CHANNELS,
    about: Mapping[str, object] | None = None,
    report: Report | None = None,
) -> list[float]:
    """Train the scorer of a frozen model and write ``out``, for ``Explain(checkpoint=out)``.

    Its target is the relevance of every visual token for the reference answer, as a distribution over the tokens of an
    image; the loss is the cross-entropy of the predicted one. Loss, optimizer and network are choices of this library,
    the paper's are not published in detail.

    Parameters
    ----------
    model, processor, source, out, plan, about
        As in `vtoken.training.train_gate`.
    channels : int
        Width of the network.
    report : callable, optional
        Called after every step with the loss and the share of relevance in the best quarter of the tokens.

    Returns
    -------
    list of float
        Loss of each step.

    Raises
    ------
    ValueError
        If a parameter is out of range, or ``out`` holds something else.
    """
    check_count("channels", channels)
    heads = adapter_for(model).language_model.config.num_attention_heads
    scorer = make_scorer(2 * heads, channels, plan.seed)

    def loss_of(step: int, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        wanted = torch.nn.utils.rnn.pad_sequence(relevance(model, batch.whole, batch.labels), True)
        maps, ctx = observed_maps(model, batch.prompt)
        scores = predict(maps, ctx, dict(scorer.named_parameters()))
        return distribution_loss(scores, wanted, ctx.candidates)

    described = {"part": "relevance scorer", "maps": 2 * heads, "channels": channels, **(about or {})}
    return train_beside(model, processor, source, scorer, loss_of, plan, out, described, report)


def make_scorer(maps: int, channels: int, seed: int) -> nn.Sequential:
    """An untrained network: 3 x 3, 3 x 3 and 1 x 1 convolutions."""
    with initial_weights(seed):
        return nn.Sequential(
            nn.Conv2d(maps, channels, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(channels, 1, 1),
        )


@torch.no_grad()
def observed_maps(model: nn.Module, prompt: Mapping[str, Any]) -> tuple[Tensor, VisualContext]:
    """The scorer's input (I, N, 2 H) and the context it belongs to."""
    seen: list[tuple[Tensor, VisualContext]] = []
    with reduce(model, Observe(lambda ctx: seen.append((first_layer_maps(ctx), ctx)), (0,))):
        model(**prompt)
    return seen[0]


def distribution_loss(scores: Tensor, wanted: Tensor, there: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the softmax of ``scores`` (I, N) against relevance ``wanted`` (I, N) over the tokens ``there``.

    The number to report, ``"found"``, is the share of the relevance that the best quarter of the scores holds.
    """
    wanted = wanted.masked_fill(~there, 0.0)
    target = wanted / wanted.sum(1, keepdim=True).clamp(min=1e-12)
    scores = scores.masked_fill(~there, float("-inf"))
    loss = -(target * scores.log_softmax(1).masked_fill(~there, 0.0)).sum(1).mean()
    rank = scores.detach().sort(dim=1, descending=True).indices.argsort(dim=1)
    best = rank < (there.sum(1, keepdim=True) / 4).ceil()
    return loss, {"found": float((target * best).sum(1).mean())}
