# SPDX-License-Identifier: Apache-2.0
"""HoloV: a budget for every part of the picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtoken.budget import share_out
from vtoken.context import VisualContext
from vtoken.ops import top_k
from vtoken.reducers.base import SelectReducer
from vtoken.reducers.checks import check_count
from vtoken.reducers.encoded import EncoderReducer
from vtoken.reducers.views import Views
from vtoken.registry import register


@register("holov")
@dataclass(frozen=True)
class HoloV(EncoderReducer, SelectReducer):
    """HoloV (arXiv 2510.02912): split the tokens into contiguous segments and give each a share of the budget.

    A segment's share follows its mean attention, and inside it the most attended tokens stay. The authors add a
    variance term to the shares, which their scaling turns into one factor common to all segments, so that it never
    changes the choice; it is left out. What a full segment cannot use goes to the others here; the authors fill it
    with zero vectors.

    Parameters
    ----------
    segments : int
        Parts in raster order.
    layer : int or float
        Block of the vision tower.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """

    summary = "Attention, with a budget for every part of the picture."
    paper = "2510.02912"
    positions = "compact"

    segments: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("segments", self.segments)

    def select(self, ctx: VisualContext, budget: Tensor) -> Tensor:
        """Slots (I, K), segment by segment."""
        scores = self.read_scores(ctx)
        parts = Views.by(segment_of(ctx.candidates, self.segments), ctx.candidates)
        values = parts.take(scores).view(parts.slots.shape)
        counts = parts.counts
        mean = values.masked_fill(parts.slots < 0, 0.0).sum(2) / counts.clamp(min=1)
        quota = segment_budget(mean, counts, budget)
        return parts.pick(top_k(values.flatten(0, 1), quota.flatten(), parts.valid))


def segment_of(valid: Tensor, segments: int) -> Tensor:
    """(B, N) long: segment of each valid token; the first ``n % segments`` segments have one more."""
    count = valid.sum(1, keepdim=True)
    parts = count.clamp(min=1, max=segments)
    base, longer = count // parts, count % parts
    rank = (valid.cumsum(1) - 1).clamp(min=0)
    late = rank - longer * (base + 1)
    return torch.where(late < 0, rank // (base + 1), longer + late // base.clamp(min=1))


def segment_budget(mean: Tensor, counts: Tensor, total: Tensor) -> Tensor:
    """Split ``total`` (B,) over segments in proportion to their score.

    Floors first, then one more for each of the segments with the largest scores; what exceeds a segment's tokens goes
    to the others in the same proportion.

    Parameters
    ----------
    mean : Tensor
        (B, P): score of each segment.
    counts : Tensor
        (B, P) long: tokens of each segment.
    total : Tensor
        (B,) long.

    Returns
    -------
    Tensor
        (B, P) long, summing to ``total``.
    """
    weights = mean.clamp(min=0) / (mean.clamp(min=0).sum(1, keepdim=True) + 1e-9)
    quota = (weights * total[:, None]).floor().long()
    rank = weights.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
    quota = quota + (rank < (total - quota.sum(1))[:, None]).long()
    quota = torch.minimum(quota, counts)
    return quota + share_out(total - quota.sum(1), weights, counts - quota)
