# SPDX-License-Identifier: Apache-2.0
"""LLaVA-PruMerge: tokens that [CLS] attends to gather their most similar neighbours."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from vtoken.context import Cut, VisualContext
from vtoken.ops import top_k
from vtoken.ops.common import index_mask
from vtoken.reducers.base import check_features, with_newlines
from vtoken.reducers.checks import check_count, check_flag
from vtoken.reducers.encoded import EncoderReducer
from vtoken.registry import register


@register("prumerge")
@dataclass(frozen=True)
class PruMerge(EncoderReducer):
    """LLaVA-PruMerge and PruMerge+ (arXiv 2403.15388).

    Each kept token adds its most key-similar tokens, kept or not, weighted by the attention [CLS] pays them; one more
    token is the weighted sum of everything dropped. As in the authors' code the weights are not normalised. The
    number of tokens is ``keep`` exactly, the extra one included. With ``adaptive`` it is what the authors let the
    image decide, the outliers of its attention, and ``keep`` is the most it may be. Attention and keys are means over
    heads; the authors treat all heads as one.

    Parameters
    ----------
    plus : bool
        PruMerge+: the outliers, then evenly spaced tokens.
    adaptive : bool
        Let the number of outliers decide how many tokens stay.
    neighbours : int
        Tokens that each kept one gathers.
    layer : int or float
        Block of the vision tower.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """

    summary = "Attention outliers that gather their most similar neighbours."
    paper = "2403.15388"
    positions = "compact"
    reads = ("best", "keys")

    keep: float | int = 0.125
    plus: bool = False
    adaptive: bool = False
    neighbours: int = 32
    layer: int | float = field(default=-1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("plus", self.plus)
        check_flag("adaptive", self.adaptive)
        check_count("neighbours", self.neighbours, least=0)

    def before_llm(self, ctx: VisualContext) -> Cut | None:
        wanted = ctx.budget(self.keep)
        weight, keys, valid = self.read_scores(ctx), self.read(ctx, "keys"), ctx.candidates
        budget = torch.minimum(wanted, valid.sum(1))
        extra = (budget > 1) & (budget < valid.sum(1))
        room = budget - extra.long()
        chosen = self._choose(weight, room, valid)
        x = check_features(ctx.features, valid, self.name)
        index = top_k(weight, chosen.sum(1), chosen)
        rows, rest = gather_similar(x, weight, keys, index, valid, self.neighbours)
        spare = top_k(weight, extra.long(), valid & ~chosen)  # the slot of the best dropped token holds the rest
        slots, features = torch.cat([index, spare], 1), rows
        if spare.shape[1]:
            features = torch.cat([rows, rest[:, None]], 1)
        cut = ctx.cut(slots)
        out = torch.cat([x, x[:, :1]], 1).float()
        place = torch.where(slots < 0, ctx.longest, slots)
        out.scatter_(1, place[..., None].expand_as(features), features)
        keep = cut.keep if self.adaptive else with_newlines(cut.keep, ctx, wanted)
        return Cut(keep, out[:, :-1].to(ctx.hidden.dtype))

    def _choose(self, weight: Tensor, room: Tensor, valid: Tensor) -> Tensor:
        """(I, N) bool: at most ``room`` (I,) tokens."""
        count = outliers(weight, valid)
        head = torch.minimum(count.clamp(min=1), room) if self.adaptive or self.plus else room
        chosen = index_mask(top_k(weight, head, valid), valid.shape[1])
        if not self.plus:
            return chosen
        if self.adaptive:
            more = every(count / valid.sum(1).clamp(min=1), valid) & ~chosen
            return chosen | (more & (more.cumsum(1) <= (room - head)[:, None]))
        rest = valid & ~chosen
        size, need = rest.sum(1, keepdim=True).clamp(min=1), (room - head)[:, None]
        rank = rest.cumsum(1)
        return chosen | (rest & (rank * need // size > (rank - 1) * need // size))


def outliers(weight: Tensor, valid: Tensor) -> Tensor:
    """(B,) long: values of (B, N) above the third quartile by more than 1.5 interquartile ranges (Eq. 4)."""
    masked = weight.double().masked_fill(~valid, float("nan"))
    low, high = torch.nanquantile(masked, torch.tensor([0.25, 0.75], dtype=torch.double, device=weight.device), dim=1)
    return ((masked > (high + 1.5 * (high - low))[:, None]) & valid).sum(1)


def every(ratio: Tensor, valid: Tensor) -> Tensor:
    """(B, N) bool: every ``int(int(1 / ratio) / 3)``-th valid token, at least every one (PruMerge+)."""
    step = ((1 / ratio.double().clamp(min=1e-6)).floor() / 3).floor().long().clamp(min=1)[:, None]
    return valid & ((valid.cumsum(1) - 1) % step == 0)


def gather_similar(
    x: Tensor, weight: Tensor, keys: Tensor, index: Tensor, valid: Tensor, neighbours: int
) -> tuple[Tensor, Tensor]:
    """Add to each chosen token its most similar ones, and sum up those that were not chosen.

    Parameters
    ----------
    x : Tensor
        (B, N, D).
    weight : Tensor
        (B, N): attention of [CLS].
    keys : Tensor
        (B, N, c).
    index : Tensor
        (B, K) long, padded with -1.
    valid : Tensor
        (B, N) bool.
    neighbours : int
        How many other tokens each one gathers.

    Returns
    -------
    rows : Tensor
        (B, K, D).
    rest : Tensor
        (B, D).
    """
    x = x.float().masked_fill(~valid[..., None], 0.0)
    weight = weight.float().masked_fill(~valid, 0.0)
    unit = functional.normalize(keys.float().masked_fill(~valid[..., None], 0.0), dim=2)
    at = index.clamp(min=0)
    similar = unit.gather(1, at[..., None].expand(-1, -1, unit.shape[2])) @ unit.mT
    similar = similar.masked_fill(~valid[:, None], float("-inf")).scatter(2, at[..., None], float("-inf"))
    near = similar.sort(dim=2, descending=True, stable=True).indices[..., :neighbours]
    shares = weight[:, None].expand_as(similar).gather(2, near)
    shares = shares.masked_fill(similar.gather(2, near).isinf(), 0.0)
    mixing = torch.zeros_like(similar).scatter_(2, near, shares)
    rows = x.gather(1, at[..., None].expand(-1, -1, x.shape[2])) + mixing @ x
    left = weight.masked_fill(index_mask(index, valid.shape[1]), 0.0)
    return rows, (left[:, None] @ x)[:, 0]
