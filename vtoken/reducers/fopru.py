# SPDX-License-Identifier: Apache-2.0
"""FoPru: focal pruning by the attention inside the vision tower."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtoken.context import VisualContext
from vtoken.ops import top_k
from vtoken.reducers.base import SelectReducer
from vtoken.reducers.checks import check_choice
from vtoken.reducers.encoded import EncoderReducer
from vtoken.reducers.views import Views, grid
from vtoken.registry import register

STRATEGIES = ("rank", "row")


@register("fopru")
@dataclass(frozen=True)
class FoPru(EncoderReducer, SelectReducer):
    """FoPru (arXiv 2411.14164): keep what the penultimate layer of the vision tower attends to.

    Significance is the attention a patch receives (mean over queries) or gives (mean over keys), whichever varies more
    over the view. Each view keeps the same share of its tokens. The paper leaves open what happens to [CLS] (its row
    and column are left out here), how a grid row is scored (by its mean), and rounding.

    Parameters
    ----------
    strategy : str
        ``"rank"``: the most significant tokens; ``"row"``: the most significant grid rows as a whole, the last one as
        far as the budget goes, most significant tokens first.
    layer : int or float
        Block of the vision tower.

    Raises
    ------
    ValueError
        If ``keep`` is out of range or the strategy is unknown.
    """

    summary = "Patches that the vision tower attends to, by token or by grid row."
    paper = "2411.14164"
    newlines = "keep"
    positions = "compact"
    reads = ("received", "given")

    strategy: str = "rank"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("strategy", self.strategy, STRATEGIES)

    def select(self, ctx: VisualContext, budget: Tensor) -> Tensor:
        """Slots (I, K) of the most significant tokens or rows of each view."""
        views = Views.of(ctx)
        received, given = (views.take(self.read_scores(ctx, what)) for what in self.reads)
        scores = significance(received, given, views.valid)
        if self.strategy == "row":
            scores = by_row(scores, views.take(grid(ctx)[0]), views.valid)
        return views.pick(top_k(scores, views.share(budget), views.valid))


def significance(received: Tensor, given: Tensor, valid: Tensor) -> Tensor:
    """The one of two scores (G, M) that has the larger variance over the valid tokens of a row."""
    wider = _variance(received, valid) > _variance(given, valid)
    return torch.where(wider[:, None], received, given)


def by_row(scores: Tensor, row: Tensor, valid: Tensor) -> Tensor:
    """Scores (G, M) that put tokens in order of the mean score of their grid row, then of their own."""
    member = (row[:, None] == torch.arange(int(row.max()) + 1, device=row.device)[:, None]) & valid[:, None]
    mean = scores[:, None].masked_fill(~member, 0.0).sum(2) / member.sum(2).clamp(min=1)
    row_place = mean.masked_fill(~member.any(2), float("-inf")).sort(dim=1, descending=True, stable=True).indices
    row_place = row_place.argsort(dim=1).gather(1, row)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    order = order.gather(1, row_place.gather(1, order).sort(dim=1, stable=True).indices)
    return -order.argsort(dim=1).float()


def _variance(x: Tensor, valid: Tensor) -> Tensor:
    count = valid.sum(1).clamp(min=1)
    x = x.masked_fill(~valid, 0.0)
    mean = x.sum(1, keepdim=True) / count[:, None]
    return ((x - mean).square() * valid).sum(1) / count
