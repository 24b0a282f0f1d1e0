# SPDX-License-Identifier: Apache-2.0
"""TowerPrune: patches that are attended to little leave the vision tower at one of its blocks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtoken.budget import budget
from vtoken.context import TowerContext
from vtoken.ops import top_k
from vtoken.reducers.base import KeepReducer
from vtoken.reducers.checks import check_block, check_choice
from vtoken.registry import register

STATISTICS = ("best", "cls", "received")


@register("tower-prune")
@dataclass(frozen=True)
class TowerPrune(KeepReducer):
    """Drop patches inside of the vision tower, by the attention of the block before.

    The tower dominates the time to first token once the language model is pruned. This is the choice of attentive
    tokens of EViT (arXiv 2202.07800, Section 3.2), at one block and without training. EViT fuses the others into one
    token, for which the shapes that a vision-language model expects have no room; here they are dropped. From
    ``block`` on the tower computes [CLS], if it has one, and the kept patches only. A dropped patch never reaches the
    language model and is no candidate of later stages, as in ``Chain([TowerPrune(keep=0.5), IDPruner(keep=0.1)])``.

    It serves towers whose views have one size, no mask, no rotary tables and no windows (CLIP, SigLIP, ViT, DINOv2,
    AIMv2, InternViT). Where the model merges patches, those of one token are dropped together.

    Parameters
    ----------
    keep : float or int
        Share of the patches *of each view* (thumbnail, crop, tile, frame), or tokens' worth of them per view. Patches
        that the model cuts away later as padding count among those of their view. 1.0 is the identity.
    block : int or float
        The first block of the tower that computes kept patches only: a number from 1, or a share of its depth in
        (0, 1). The default was chosen on development scenes of the embedded model (`benchmarks/tower_prune.py`).
        A model that takes its features from an earlier block gains nothing.
    by : {"best", "cls", "received"}
        Attention of [CLS], or mean attention received from all patches; "best" is [CLS] where the tower has one.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """

    summary = "Drops patches inside the vision tower that the block before attends to least."
    paper = "2202.07800"
    newlines = "keep"

    keep: float | int = 0.5
    block: int | float = 0.25
    by: str = "best"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block("block", self.block)
        check_choice("by", self.by, STATISTICS)

    def tower_block(self) -> int | float:
        return self.block

    def tower_reads(self) -> tuple[str, ...]:
        return (self.by,)

    def in_tower(self, ctx: TowerContext) -> Tensor:
        """Groups (V, K) with the highest attention."""
        scores = ctx.statistics[self.by]
        if not bool(scores.isfinite().all()):
            raise ValueError(
                f"Reducer {self.name!r} found attention in the vision tower that is not finite: check the model's "
                "dtype (float16 overflows) and its inputs."
            )
        groups = scores.new_full((len(scores),), scores.shape[1]).long()
        return top_k(scores, budget(self.keep, groups))
