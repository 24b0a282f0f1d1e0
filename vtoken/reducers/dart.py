# SPDX-License-Identifier: Apache-2.0
"""DART: keep a few pivots and what is least like them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtoken.context import Cut, VisualContext
from vtoken.ops import top_k
from vtoken.ops.common import index_mask, unit_vectors
from vtoken.ops.ragged import gather
from vtoken.reducers.base import KeepReducer, with_newlines
from vtoken.reducers.checks import check_choice, check_count, check_place, layer_at
from vtoken.reducers.rows import question_rows, rows_at
from vtoken.registry import register

NORMS = ("keys", "keys_l1", "states")


@register("dart")
@dataclass(frozen=True)
class DART(KeepReducer):
    """Duplication-aware reduction of tokens (arXiv 2502.11494), which ranks nothing by attention.

    The longest visual and text tokens are pivots. One pivot after the other, visual ones first, keeps the tokens least
    similar to it, in equal numbers. Similarities are those of the hidden states; the authors take them through the
    decoder's final norm, and measure length on the keys of the layer before the cut.

    Parameters
    ----------
    layer : int or float
        First decoder layer without the dropped tokens, at least 1, or a share of the depth.
    pivots : int
        Visual pivots, which stay.
    text_pivots : int
        Text tokens behind the image that serve as further pivots.
    norm : str
        What pivots are long by. ``"states"``: the Euclidean norm of the hidden states. ``"keys"``: that of the keys
        over all heads of the layer before the cut, which their rotation leaves alone. ``"keys_l1"``: the sum of the
        keys' magnitudes, as in the authors' code; of rotated keys it depends on the position ids, so that a row of a
        padded batch is chosen from as it is alone only if its positions start at 0, as those of ``generate`` do.

    Raises
    ------
    ValueError
        If a parameter is out of range or unknown.
    """

    summary = "Pivots, and the tokens least like them."
    paper = "2502.11494"
    uses_text = True

    layer: int | float = 2
    pivots: int = 4
    text_pivots: int = 4
    norm: str = "states"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_place("layer", self.layer, least=1)
        check_count("pivots", self.pivots)
        check_count("text_pivots", self.text_pivots, least=0)
        check_choice("norm", self.norm, NORMS)

    def layers(self, depth: int) -> tuple[int, ...]:
        return (max(1, layer_at(self.layer, depth)),)

    def taps(self, depth: int) -> dict[int, str]:
        return {layer - 1: "last" for layer in self.layers(depth)} if self.norm != "states" else {}

    def at_layer(self, layer: int, ctx: VisualContext) -> Cut | None:
        """Keep the pivots and what is least like each of them."""
        wanted = ctx.budget(self.keep)
        budget = torch.minimum(wanted, ctx.candidates.sum(1))
        lengths = self._lengths(layer, ctx)
        unit = unit_vectors(ctx.features, ctx.candidates)
        visual = top_k(ctx.per_item(lengths), budget.clamp(max=self.pivots), ctx.candidates)
        pivots, real = self._with_text(ctx, lengths, unit, visual)
        keep = least_similar(unit, pivots, real, ctx.cut(visual).keep, budget, ctx.candidates)
        return Cut(with_newlines(keep, ctx, wanted))

    def _lengths(self, layer: int, ctx: VisualContext) -> Tensor:
        """(B, S) float32: how long each token is."""
        if self.norm == "states":
            return ctx.hidden.float().norm(dim=2)
        keys = rows_at(ctx, layer - 1).keys
        assert keys is not None
        rows = keys.float().transpose(1, 2).flatten(2)
        return rows.norm(p=1 if self.norm == "keys_l1" else 2, dim=2)

    def _with_text(self, ctx: VisualContext, lengths: Tensor, unit: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors (I, P, D) of all pivots, and which of them are real."""
        found, real = gather(unit, visual.clamp(min=0)), visual >= 0
        if not self.text_pivots:
            return found, real
        index, valid = question_rows(ctx)
        states = gather(ctx.hidden.float(), index)
        best = top_k(gather(lengths, index), self.text_pivots, valid)
        text = torch.nn.functional.normalize(gather(states, best.clamp(min=0)), dim=2)
        owner = ctx.row.clamp(min=0)
        return torch.cat([found, text[owner]], 1), torch.cat([real, best[owner] >= 0], 1)


def least_similar(unit: Tensor, pivots: Tensor, real: Tensor, keep: Tensor, budget: Tensor, valid: Tensor) -> Tensor:
    """Fill ``keep`` up to the budget, an equal part by dissimilarity to each pivot.

    Parameters
    ----------
    unit : Tensor
        (B, N, D) unit vectors.
    pivots : Tensor
        (B, P, D) unit vectors.
    real : Tensor
        (B, P) bool.
    keep, valid : Tensor
        (B, N) bool.
    budget : Tensor
        (B,) long.

    Returns
    -------
    Tensor
        (B, N) bool, ``budget`` of them True.
    """
    similar = unit @ pivots.mT
    for number in range(pivots.shape[1]):
        waiting = real[:, number:].sum(1).clamp(min=1)
        part = torch.where(real[:, number], -(-(budget - keep.sum(1)) // waiting), 0)
        index = top_k(-similar[..., number], part, valid & ~keep)
        keep = keep | index_mask(index, keep.shape[1])
    return keep
