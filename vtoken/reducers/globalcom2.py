# SPDX-License-Identifier: Apache-2.0
"""GlobalCom²: the thumbnail decides how much of each crop stays."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from vtoken.budget import share_out
from vtoken.context import ItemLayout, VisualContext
from vtoken.encoder import EncoderRead
from vtoken.ops import top_k
from vtoken.reducers.base import SelectReducer, check_scores
from vtoken.reducers.checks import check_choice, check_number
from vtoken.reducers.encoded import EncoderReducer
from vtoken.reducers.views import Views
from vtoken.registry import register

SCORES = ("cls", "features")


@register("globalcom2")
@dataclass(frozen=True)
class GlobalCom2(EncoderReducer, SelectReducer):
    """GlobalCom² (arXiv 2501.05179): global-guided compression of high-resolution crops.

    Crops that cover what [CLS] attends to in the thumbnail keep more. Inside a crop a token is scored by its own
    attention plus that of the thumbnail at the same place, each normalised over the crop. The scores are attention
    logits, as in the authors' code: the temperature 10 is meant for sums of them. The budget is exact over thumbnail
    and crops together, where the authors truncate each part. Images without crops are scored plainly.

    Parameters
    ----------
    scores : str
        ``"cls"``: logits of [CLS]; ``"features"``: ``-cos(x, mean of the view)`` for towers without [CLS].
    temperature : float
        Softens the difference between crops.
    layer : int or float
        Block of the vision tower.

    Raises
    ------
    ValueError
        If a parameter is out of range or unknown.
    """

    summary = "The thumbnail decides how much of each crop stays."
    paper = "2501.05179"
    newlines = "keep"
    positions = "compact"
    reads = ("cls_logits",)

    scores: str = "cls"
    temperature: float = 10.0
    layer: int | float = field(default=-1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scores", self.scores, SCORES)
        check_number("temperature", self.temperature, 0, above=True)

    def encoder_reads(self) -> tuple[EncoderRead, ...]:
        return super().encoder_reads() if self.scores == "cls" else ()

    def select(self, ctx: VisualContext, budget: Tensor) -> Tensor:
        """Slots (I, K) of thumbnail and crops."""
        scores = self.read(ctx, "cls_logits") if self.scores == "cls" else unlike_mean(ctx)
        scores = check_scores(scores, ctx, self.name)
        quota, guided = [], []
        views = int(ctx.view.max()) + 1
        for i, layout in enumerate(ctx.layouts):
            own = scores[i, : len(layout.view)]
            share = float(budget[i]) / max(1, int(ctx.candidates[i].sum()))
            found = self._guide(own, ctx.candidates[i, : len(own)], layout, share)
            guided.append(functional.pad(found[0], (0, ctx.longest - len(own))))
            quota.append(functional.pad(found[1], (0, views - len(found[1]))))
        return self._pick(ctx, torch.stack(guided), torch.stack(quota), budget)

    def _guide(self, own: Tensor, candidates: Tensor, layout: ItemLayout, share: float) -> tuple[Tensor, Tensor]:
        """Scores (N,) and relative weight (V,) of the views of one item."""
        view = layout.view.to(own.device)
        if layout.thumbnail is None or 0 in layout.crops or layout.crops[0] * layout.crops[1] + 1 != len(layout.grids):
            return own, own.new_zeros(0)
        rows, columns = layout.grids[layout.thumbnail]
        seen = view == layout.thumbnail
        picture = own.new_zeros(rows, columns)
        picture[layout.row.to(own.device)[seen], layout.column.to(own.device)[seen]] = own[seen]
        ratios = crop_ratios(picture, layout.crops, share, self.temperature)
        weights = torch.full((len(layout.grids),), share, dtype=torch.float32, device=own.device)
        crops = torch.tensor([v for v in range(len(layout.grids)) if v != layout.thumbnail], device=own.device)
        weights[crops] = ratios
        number = torch.full((len(layout.grids) + 1,), -1, device=own.device)  # of a view among the crops; last: newline
        number[crops] = torch.arange(len(crops), device=own.device)
        crop = number[view].masked_fill(~candidates, -1)
        return torch.where(crop >= 0, crop_scores(picture, own, crop, layout), own), weights

    @staticmethod
    def _pick(ctx: VisualContext, scores: Tensor, weights: Tensor, budget: Tensor) -> Tensor:
        plain = ~(weights > 0).any(1)
        views = Views.by(ctx.view.masked_fill(plain[:, None], 0).clamp(min=0), ctx.candidates)
        counts = views.counts
        weights = torch.where(plain[:, None], 1.0, weights)[:, : counts.shape[1]]
        quota = share_out(budget, counts * weights, counts)
        return views.pick(top_k(views.take(scores), quota.flatten(), views.valid))


def unlike_mean(ctx: VisualContext) -> Tensor:
    """(I, N): ``-cos`` of each feature and the mean of its view."""
    views = Views.of(ctx)
    x = views.take(ctx.features).float() * views.valid[..., None]
    mean = x.sum(1, keepdim=True) / views.valid.sum(1).clamp(min=1)[:, None, None]
    out = x.new_zeros(ctx.items, ctx.longest + 1)
    slots = views.slots.flatten(1)
    values = -functional.cosine_similarity(x, mean, dim=2).view(ctx.items, -1)
    return out.scatter_(1, torch.where(slots < 0, ctx.longest, slots), values)[:, :-1]


def crop_ratios(picture: Tensor, crops: tuple[int, int], share: float, temperature: float) -> Tensor:
    """Share of its tokens that each crop keeps.

    Parameters
    ----------
    picture : Tensor
        (rows, columns): scores of the thumbnail.
    crops : (rows, columns)
        Arrangement of the crops.
    share : float
        Mean share.
    temperature : float
        Of the softmax over the crops' sums.

    Returns
    -------
    Tensor
        (crops,): at most 1.
    """
    place = [
        (torch.arange(extent, device=picture.device) // max(extent // parts, 1)).clamp(max=parts - 1)
        for extent, parts in zip(picture.shape, crops, strict=True)
    ]
    cell = place[0][:, None] * crops[1] + place[1]
    sums = picture.new_zeros(crops[0] * crops[1]).scatter_add_(0, cell.flatten(), picture.flatten())
    weight = ((sums - sums.max()) / temperature).exp()
    weight = weight / (weight.sum() + 1e-8)
    return (share * (1 + weight - weight.mean())).clamp(max=1.0)


def crop_scores(picture: Tensor, own: Tensor, crop: Tensor, layout: ItemLayout) -> Tensor:
    """Own score plus that of the thumbnail at the same place, each divided by its norm over the crop.

    The part of the mosaic of crops that has tokens shows the whole picture, so the thumbnail is stretched over it.

    Parameters
    ----------
    picture : Tensor
        (rows, columns): scores of the thumbnail.
    own : Tensor
        (N,).
    crop : Tensor
        (N,) long: number of the crop in raster order, -1 for other tokens.
    layout : ItemLayout
        Of the item.

    Returns
    -------
    Tensor
        (N,): 0 for other tokens.
    """
    sides = [grid for view, grid in enumerate(layout.grids) if view != layout.thumbnail]
    inside = crop >= 0
    if not bool(inside.any()):
        return torch.zeros_like(own)
    row = layout.row.to(own.device) + crop // layout.crops[1] * sides[0][0]
    column = layout.column.to(own.device) + crop % layout.crops[1] * sides[0][1]
    top, left = row[inside].min(), column[inside].min()
    extent = int(row[inside].max() - top) + 1, int(column[inside].max() - left) + 1
    wide = functional.interpolate(picture[None, None], extent, mode="bilinear", align_corners=False)[0, 0]
    guide = torch.zeros_like(own)
    guide[inside] = wide[(row - top)[inside], (column - left)[inside]]
    number = crop.masked_fill(~inside, len(sides))
    parts = []
    for values in (own, guide):
        norm = own.new_zeros(len(sides) + 1).scatter_add_(0, number, values.square()).sqrt()
        parts.append(values / norm.clamp(min=1e-12)[number])
    return (parts[0] + parts[1]).masked_fill(~inside, 0.0)
