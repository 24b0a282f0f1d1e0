# SPDX-License-Identifier: Apache-2.0
"""A random subset: the control every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtoken.context import VisualContext
from vtoken.reducers.base import ScoreReducer
from vtoken.reducers.checks import check_count
from vtoken.reducers.draws import draw
from vtoken.reducers.placed import PlacedReducer
from vtoken.registry import register


@register("random")
@dataclass(frozen=True)
class Random(PlacedReducer, ScoreReducer):
    """Keep a random subset of the tokens of each image.

    The draw depends on the seed and on the number of tokens of the image alone, so that an image gets the same tokens
    in any batch.

    Parameters
    ----------
    seed : int
        Non-negative.
    layer : int, float or None
        First decoder layer without the dropped tokens, at least 1, or a share of the depth; None acts before the
        language model. Deep in the decoder this is hard to beat (arXiv 2512.07580): a control for methods that act
        there, or the second stage of ``Chain([DivPrune(keep=0.5), Random(keep=0.25, layer=20)])``.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """

    summary = "A random subset (control)."

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("seed", self.seed, least=0)

    def score(self, ctx: VisualContext) -> Tensor:
        """Random numbers (I, N)."""
        draws = [draw(self.seed, len(layout.view), len(layout.view)) for layout in ctx.layouts]
        return torch.nn.utils.rnn.pad_sequence(draws, True).to(ctx.hidden.device)
