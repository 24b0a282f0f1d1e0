# SPDX-License-Identifier: Apache-2.0
"""OTPrune: the subset whose distribution is nearest to that of all tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtoken.context import VisualContext
from vtoken.ops import log_det
from vtoken.ops.common import EPS
from vtoken.reducers.base import SelectReducer, check_features
from vtoken.reducers.checks import check_number
from vtoken.registry import register


@register("otprune")
@dataclass(frozen=True)
class OTPrune(SelectReducer):
    """OTPrune (arXiv 2602.20205): optimal transport to all tokens, as a greedy log-determinant.

    Each channel of the projected features is normalised over the tokens of the image; ``G`` are their products, and
    the set maximises the determinant of ``I + gamma G Gᵀ``. All views of an image compete with each other, and
    newlines are no candidates. The authors' code passes the text along and does not use it.

    Parameters
    ----------
    gamma : float
        Weight of the similarities.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """

    summary = "Greedy log-determinant of squared similarities, after optimal transport."
    paper = "2602.20205"
    positions = "compact"

    gamma: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("gamma", self.gamma, 0, above=True)

    def select(self, ctx: VisualContext, budget: Tensor) -> Tensor:
        """Slots (I, K) in pick order."""
        x = check_features(ctx.features, ctx.candidates, self.name)
        return log_det(unit_channels(x, ctx.candidates), budget, self.gamma, ctx.candidates)


def unit_channels(x: Tensor, valid: Tensor) -> Tensor:
    """(B, N, D) float32: each channel of length 1 over the valid tokens, 0 where it is 0 on all of them."""
    x = x.float().masked_fill(~valid[..., None], 0.0)
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=EPS)
