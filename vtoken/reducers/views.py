# SPDX-License-Identifier: Apache-2.0
"""The candidates of a context regrouped by view (thumbnail, crops, tiles, frames) or by any other number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtoken.budget import share_out
from vtoken.context import VisualContext
from vtoken.ops.ragged import gather

NO_VIEW = -3  # no token carries it: -1 is a newline, -2 padding


@dataclass(frozen=True)
class Views:
    """Candidates by view; I items, V views of the item that has most, M tokens of the largest view.

    Parameters
    ----------
    slots : Tensor
        (I, V, M) long: slots of the candidates of each view in order, padded with -1.
    """

    slots: Tensor

    @classmethod
    def of(cls, ctx: VisualContext) -> Views:
        """Group the candidates of ``ctx`` by view."""
        return cls.by(ctx.view, ctx.candidates)

    @classmethod
    def whole(cls, ctx: VisualContext) -> Views:
        """All candidates of an item in one group."""
        return cls.by(torch.zeros_like(ctx.view), ctx.candidates)

    @classmethod
    def by(cls, number: Tensor, candidates: Tensor) -> Views:
        """Group the candidates (I, N) by a non-negative number (I, N)."""
        views = max(int(number.max()) + 1, 1)
        member = (number[:, None] == torch.arange(views, device=number.device)[:, None]) & candidates[:, None]
        count = member.sum(2)
        order = member.to(torch.uint8).sort(dim=2, descending=True, stable=True).indices[..., : int(count.max())]
        inside = torch.arange(order.shape[2], device=order.device) < count[..., None]
        return cls(torch.where(inside, order, -1))

    @property
    def valid(self) -> Tensor:
        """(I * V, M) bool."""
        return self.slots.flatten(0, 1) >= 0

    @property
    def counts(self) -> Tensor:
        """(I, V) long: candidates of each view."""
        return (self.slots >= 0).sum(2)

    def take(self, x: Tensor) -> Tensor:
        """(I, N, ...) to (I * V, M, ...)."""
        return gather(x, self.slots.flatten(1).clamp(min=0)).view(-1, self.slots.shape[2], *x.shape[2:])

    def pick(self, index: Tensor) -> Tensor:
        """Indices (I * V, K) inside the views, padded with -1, to slots (I, V * K) of the items."""
        slots = self.slots.flatten(0, 1).gather(1, index.clamp(min=0)).masked_fill(index < 0, -1)
        return slots.view(len(self.slots), -1)

    def scatter(self, index: Tensor, longest: int) -> Tensor:
        """An index (I * V, M) inside the views per token, padded with -1, to slots per token: (I, N)."""
        slots = self.slots.flatten(1)
        target = self.slots.flatten(0, 1).gather(1, index.clamp(min=0)).masked_fill(index < 0, -1)
        out = torch.full((len(slots), longest + 1), -1, device=slots.device)
        return out.scatter_(1, torch.where(slots < 0, longest, slots), target.view(len(slots), -1))[:, :-1]

    def spread(self, values: Tensor, out: Tensor) -> Tensor:
        """Values (I * V, M) per candidate, into a copy of ``out`` (I, N)."""
        slots = self.slots.flatten(1)
        wide = torch.cat([out, out[:, :1]], 1)
        place = torch.where(slots < 0, out.shape[1], slots)
        return wide.scatter(1, place, values.to(out.dtype).view(len(slots), -1))[:, :-1]

    def share(self, budget: Tensor, equal: bool = False) -> Tensor:
        """Split the budget (I,) over the views: in proportion to their tokens, or equally where there is room.

        Returns
        -------
        Tensor
            (I * V,) long.
        """
        counts = self.counts
        weights = (counts > 0).long() if equal else counts
        return share_out(torch.minimum(budget, counts.sum(1)), weights, counts).flatten()


def thumbnail(ctx: VisualContext) -> Tensor:
    """(I, N) bool: candidates of the view that shows the whole image; all candidates where there is no such view."""
    number = [NO_VIEW if layout.thumbnail is None else layout.thumbnail for layout in ctx.layouts]
    inside = (ctx.view == torch.tensor(number, device=ctx.view.device)[:, None]) & ctx.candidates
    return torch.where(inside.any(1, keepdim=True), inside, ctx.candidates)


def grid(ctx: VisualContext) -> tuple[Tensor, Tensor]:
    """Row and column (I, N) of each token in the grid of its view, 0 on the padding."""
    pad = torch.nn.utils.rnn.pad_sequence
    rows = pad([layout.row for layout in ctx.layouts], True).to(ctx.view.device)
    return rows, pad([layout.column for layout in ctx.layouts], True).to(ctx.view.device)
