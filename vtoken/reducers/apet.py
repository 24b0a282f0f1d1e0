# SPDX-License-Identifier: Apache-2.0
"""ApET: a few basis tokens, and those that the basis approximates worst, into which the rest is merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vtoken.context import VisualContext
from vtoken.ops import top_k
from vtoken.ops.common import finite, index_mask
from vtoken.ops.cosines import CHUNK
from vtoken.ops.ragged import gather
from vtoken.precision import selection
from vtoken.reducers.base import Assignment, MergeReducer
from vtoken.reducers.checks import check_count, check_flag
from vtoken.reducers.draws import draw
from vtoken.reducers.views import Views
from vtoken.reducers.visionzip import join
from vtoken.registry import register

RIDGE = 1e-5


@register("apet")
@dataclass(frozen=True)
class ApET(MergeReducer):
    """ApET (arXiv 2602.19870): tokens by the error of their approximation.

    Basis tokens are sampled far from each other, all tokens are approximated by them with least squares, and the ones
    with the largest error stay beside the basis. What is dropped is averaged into the most similar of the latter; basis
    tokens stay as they are. Each view gets the same budget. Where that is no larger than the basis, the basis is one
    token smaller than it.

    The authors' code chooses the whole budget by error, then writes the basis over the least of them: basis tokens
    stand in places that are not theirs, what they replace is lost, and they are merged into others, too. With
    ``compat`` so it is here.

    Parameters
    ----------
    basis : int
        Basis tokens of each view.
    seed : int
        Non-negative: chooses the first basis token, which the authors draw. An image gets the same one in any batch.
    compat : bool
        Write the basis over kept tokens as the authors' code does.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """

    summary = "Tokens that a few basis tokens approximate worst, the rest merged into them."
    paper = "2602.19870"
    positions = "compact"

    basis: int = 10
    seed: int = 0
    compat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("basis", self.basis)
        check_count("seed", self.seed, least=0)
        check_flag("compat", self.compat)

    def assign(self, ctx: VisualContext, budget: Tensor) -> Assignment:
        """Send each dropped token to the kept one of largest cosine that is no basis token."""
        views = Views.of(ctx)
        return Assignment(views.scatter(self._plan(ctx, views, budget).source, ctx.longest))

    def merge(self, ctx: VisualContext, assignment: Assignment) -> Tensor:
        merged = super().merge(ctx, assignment)
        if not self.compat:
            return merged
        views = Views.of(ctx)
        budget = torch.minimum(ctx.budget(self.keep), ctx.candidates.sum(1))
        written = views.scatter(self._plan(ctx, views, budget).written, ctx.longest)
        return torch.where(written[..., None] >= 0, gather(ctx.features.float(), written.clamp(min=0)), merged)

    def _plan(self, ctx: VisualContext, views: Views, budget: Tensor) -> Plan:
        shares = [draw(self.seed, len(layout.view), 1) for layout in ctx.layouts]
        share = torch.cat(shares).to(budget.device).repeat_interleave(views.slots.shape[1])
        start = (share * views.valid.sum(1)).long()  # candidates of a view stand in front
        x, quota = views.take(ctx.features), views.share(budget, equal=True)
        return plan(x, quota, start, views.valid, self.basis, self.compat)


class Plan(NamedTuple):
    """What becomes of the tokens of each row.

    Attributes
    ----------
    basis : Tensor
        (B, k) long in the order of sampling, padded with -1.
    error : Tensor
        (B, N) float32: distance between a token and its approximation.
    source : Tensor
        (B, N) long: where each token goes, itself if it is kept, -1 if it is dropped.
    written : Tensor
        (B, N) long: the token whose features a kept one is given instead of its own, -1 for none.
    """

    basis: Tensor
    error: Tensor
    source: Tensor
    written: Tensor


@selection
def plan(x: Tensor, quota: Tensor, start: Tensor, valid: Tensor, basis: int, compat: bool = False) -> Plan:
    """Choose ``quota`` (B,) tokens of each row of ``x`` (B, N, D), up to ``basis`` of them as a basis.

    Parameters
    ----------
    x : Tensor
        (B, N, D).
    quota, start : Tensor
        (B,) long: tokens to keep, and the first basis token.
    valid : Tensor
        (B, N) bool.
    basis : int
        Basis tokens; at most one fewer than ``quota``.
    compat : bool
        See `ApET`.

    Raises
    ------
    ValueError
        If a token is not finite.
    """
    x = finite(x, valid, "features")
    count = (quota - 1).clamp(min=0, max=basis)
    chosen = farthest_points(x, count, start, valid)
    error = approximation_error(x, chosen)
    written = torch.full_like(valid, -1, dtype=torch.long)
    if compat:
        order = top_k(error, quota, valid)
        least = torch.arange(order.shape[1], device=order.device) >= (quota - count)[:, None]
        targets = index_mask(order.masked_fill(least, -1), x.shape[1])
        fixed = index_mask(order.masked_fill(~least, -1), x.shape[1])
        rank = (fixed.cumsum(1) - 1).clamp(min=0)
        if chosen.shape[1]:
            written = torch.where(fixed, chosen.gather(1, rank.clamp(max=chosen.shape[1] - 1)), -1)
    else:
        fixed = index_mask(chosen, x.shape[1])
        targets = index_mask(top_k(error, quota - count, valid & ~fixed), x.shape[1])
    return Plan(chosen, error, join(x, fixed, targets, valid), written)


def farthest_points(x: Tensor, count: Tensor, start: Tensor, valid: Tensor) -> Tensor:
    """(B, max count) long: ``start`` (B,), then again and again the token farthest (Euclid) from those picked."""
    picked = count.new_full((len(count), int(count.max())), -1)
    gap = torch.full_like(valid, float("inf"), dtype=torch.float32).masked_fill(~valid, -1.0)
    at = start[:, None]
    for step in range(picked.shape[1]):
        picked[:, step] = torch.where(step < count, at[:, 0], -1)
        gap = torch.minimum(gap, (x - gather(x, at)).square().sum(2)).scatter(1, at, -1.0)
        at = gap.argmax(1, keepdim=True)
    return picked


def approximation_error(x: Tensor, basis: Tensor) -> Tensor:
    """(B, N) float32: distance of each token to its ridge regression on the tokens ``basis`` (B, k).

    In float64, where the ridge counts: equal basis tokens make the system singular.
    """
    rows = gather(x, basis.clamp(min=0)).double().masked_fill((basis < 0)[..., None], 0.0)
    gram = rows @ rows.mT + RIDGE * torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    found = []
    for part in x.split(CHUNK, 1):
        part = part.double()
        weights = torch.linalg.solve(gram, rows @ part.mT)
        found.append((part - weights.mT @ rows).norm(dim=2))
    return torch.cat(found, 1).float()
