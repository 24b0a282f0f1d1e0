# SPDX-License-Identifier: Apache-2.0
"""VisionZip: dominant tokens, and a few that gather the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vtoken.context import VisualContext
from vtoken.ops import merge_rows, top_k
from vtoken.reducers.base import Assignment, MergeReducer
from vtoken.reducers.checks import check_flag, check_number
from vtoken.reducers.encoded import EncoderReducer
from vtoken.registry import register


@register("visionzip")
@dataclass(frozen=True)
class VisionZip(EncoderReducer, MergeReducer):
    """VisionZip (arXiv 2412.04467): keep what [CLS] attends to and merge the others into evenly spaced targets.

    Others join the target whose key is most similar. The authors count [CLS] itself among the dominant tokens and pass
    it on; stock models have dropped it, so all dominant tokens are patches. Their contextual token is the target
    *plus* the mean of what joined it, about twice as long as any other token; here it is the mean of all of them.

    Parameters
    ----------
    contextual : float
        Share of the budget for the merged tokens; 10 of the authors' 64.
    layer : int or float
        Block of the vision tower that gives attention and keys.
    compat : bool
        Add the mean to the target as the authors' code does.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """

    summary = "Tokens that [CLS] attends to, the rest merged into a few."
    paper = "2412.04467"
    positions = "compact"
    reads = ("best", "keys")

    contextual: float = 10 / 64
    compat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("contextual", self.contextual, 0, 1)
        check_flag("compat", self.compat)

    def assign(self, ctx: VisualContext, budget: Tensor) -> Assignment:
        """Send each token that is neither dominant nor a target to the target with the most similar key."""
        scores, keys = self.read_scores(ctx), self.read(ctx, "keys")
        contextual = torch.minimum((budget.float() * self.contextual).round().long(), budget - 1).clamp(min=0)
        dominant = ctx.cut(top_k(scores, budget - contextual, ctx.candidates)).keep
        targets = spaced(ctx.candidates & ~dominant, contextual)
        return Assignment(join(keys, dominant, targets, ctx.candidates))

    def merge(self, ctx: VisualContext, assignment: Assignment) -> Tensor:
        return with_mean_added(ctx.features, assignment.source) if self.compat else super().merge(ctx, assignment)


def spaced(rest: Tensor, count: Tensor) -> Tensor:
    """(B, N) bool: every (M // count)-th of the M True values of each row, the first ``count`` (B,) of them."""
    step = (rest.sum(1) // count.clamp(min=1)).clamp(min=1)[:, None]
    rank = rest.cumsum(1) - 1
    return rest & (rank % step == 0) & (rank // step < count[:, None])


def join(keys: Tensor, dominant: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """Slot of the target with the most similar key.

    Parameters
    ----------
    keys : Tensor
        (B, N, c).
    dominant, targets, valid : Tensor
        (B, N) bool.

    Returns
    -------
    Tensor
        (B, N) long: dominant tokens and targets name themselves; -1 where there is no target or no valid token.
    """
    slots = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
    index = top_k(targets.float(), targets.sum(1), targets)
    own = torch.where((dominant | targets) & valid, slots, -1)
    if index.shape[1] == 0:
        return own
    unit = functional.normalize(keys.float().masked_fill(~valid[..., None], 0.0), dim=2)
    aim = unit.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, unit.shape[2]))
    nearest = (unit @ aim.mT).masked_fill((index < 0)[:, None], float("-inf")).argmax(2)
    joined = index.gather(1, nearest)
    return torch.where(own >= 0, own, torch.where(valid, joined, -1))


def with_mean_added(x: Tensor, source: Tensor) -> Tensor:
    """Each token plus the mean of the others that were merged into it: (B, N, D), as in the authors' code."""
    slots = torch.arange(x.shape[1], device=x.device)
    return x.float() + merge_rows(x, source.masked_fill(source == slots, -1), x.shape[1])
