# SPDX-License-Identifier: Apache-2.0
"""IDPruner: maximal marginal relevance of importance and diversity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from vtoken.context import VisualContext
from vtoken.encoder import EncoderRead
from vtoken.ops import mmr
from vtoken.reducers.base import SelectReducer, check_scores
from vtoken.reducers.checks import check_count, check_number
from vtoken.reducers.encoded import EncoderReducer
from vtoken.registry import register


@register("idpruner")
@dataclass(frozen=True)
class IDPruner(EncoderReducer, SelectReducer):
    """IDPruner (arXiv 2602.13315): trade importance against similarity to the tokens kept so far.

    The published importance comes from a trained scorer. Here it is the attention inside the vision tower, of [CLS]
    where there is one, else received from all patches: a training-free variant of the method, to which the published
    numbers do not apply. A ``scorer`` brings any other importance, such as the trained one.

    Parameters
    ----------
    lam : float
        Weight of the importance, in [0, 1].
    parallel : int
        Picks a step; they do not see each other.
    layer : int or float
        Block of the vision tower.
    scorer : callable, optional
        ``scorer(ctx) -> (I, N)`` scores of any scale.

    Raises
    ------
    ValueError
        If ``keep``, ``lam`` or ``parallel`` is out of range.
    """

    summary = "Importance against redundancy, greedily (MMR)."
    paper = "2602.13315"

    lam: float = 0.5
    parallel: int = 1
    scorer: Callable[[VisualContext], Tensor] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("lam", self.lam, 0, 1)
        check_count("parallel", self.parallel)

    def encoder_reads(self) -> tuple[EncoderRead, ...]:
        return () if self.scorer else super().encoder_reads()

    def select(self, ctx: VisualContext, budget: Tensor) -> Tensor:
        """Slots (I, K) in pick order."""
        scores = check_scores(self.scorer(ctx), ctx, self.name) if self.scorer else self.read_scores(ctx)
        return mmr(ctx.features, scores, budget, self.lam, self.parallel, ctx.candidates)
