# SPDX-License-Identifier: Apache-2.0
"""Base of the reducers that look at one block of the vision tower."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from vtoken.context import VisualContext
from vtoken.encoder import EncoderRead
from vtoken.reducers.base import KeepReducer, check_scores
from vtoken.reducers.checks import check_block


@dataclass(frozen=True)
class EncoderReducer(KeepReducer):
    """A reducer with a budget that reads statistics of a block of the vision tower.

    It stands before the base that does the cutting: ``class Mine(EncoderReducer, SelectReducer)``.

    Parameters
    ----------
    layer : int or float
        Block of the vision tower, as `vtoken.EncoderRead` takes it.

    Raises
    ------
    ValueError
        If ``layer`` names no block.
    """

    reads: ClassVar[tuple[str, ...]] = ("best",)
    """Statistics of the block, each as `vtoken.EncoderRead` names it."""

    layer: int | float = field(default=-2, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block("layer", self.layer)

    def encoder_reads(self) -> tuple[EncoderRead, ...]:
        return tuple(EncoderRead(what, self.layer) for what in self.reads)

    def read(self, ctx: VisualContext, what: str, layer: int | float | None = None) -> Tensor:
        """(I, N) or (I, N, C): a statistic of the block, or of another one that `encoder_reads` names."""
        return ctx.encoder[EncoderRead(what, self.layer if layer is None else layer)]

    def read_scores(self, ctx: VisualContext, what: str = "best", layer: int | float | None = None) -> Tensor:
        """(I, N) float32: the same for a statistic that ranks tokens, 0 outside of the candidates.

        Raises
        ------
        ValueError
            If a score of a candidate is not finite.
        """
        return check_scores(self.read(ctx, what, layer), ctx, self.name)
