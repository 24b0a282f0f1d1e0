# SPDX-License-Identifier: Apache-2.0
"""VTW: no visual token from a fixed decoder layer on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtoken.context import Cut, VisualContext
from vtoken.reducers.base import Reducer
from vtoken.reducers.checks import check_place, layer_at
from vtoken.registry import register


@register("vtw")
@dataclass(frozen=True)
class VTW(Reducer):
    """Visual tokens withdrawal (arXiv 2405.05803): drop all visual tokens before one decoder layer.

    Parameters
    ----------
    layer : int or float
        First layer without visual tokens, at least 1, or a share of the depth. `calibrated_layer` finds it as the
        authors do, from `vtoken.training.exit_divergence` of a few samples.

    Raises
    ------
    ValueError
        If ``layer`` is out of range.
    """

    summary = "No visual token from a fixed decoder layer on."
    paper = "2405.05803"

    layer: int | float = 0.5

    def __post_init__(self) -> None:
        check_place("layer", self.layer, least=1)

    def layers(self, depth: int) -> tuple[int, ...]:
        return (max(1, layer_at(self.layer, depth)),)

    def at_layer(self, layer: int, ctx: VisualContext) -> Cut | None:
        """Drop everything."""
        return Cut(ctx.valid & False)


def calibrated_layer(divergence: Tensor, threshold: float = 0.003, margin: int = 5) -> int:
    """The layer to withdraw at: the first quiet one, and a margin.

    Parameters
    ----------
    divergence : Tensor
        (samples, L): Kullback-Leibler divergence of the next token without visual tokens from that layer on, against
        the full model. The authors use 20 samples.
    threshold : float
        0.003 for LLaVA-1.5, 1e-4 for LLaVA-NeXT.
    margin : int
        Layers added for safety.

    Raises
    ------
    ValueError
        If no layer is quiet.
    """
    quiet = (divergence.float().mean(0) <= threshold).nonzero()
    if not len(quiet):
        raise ValueError(f"No layer has a mean divergence of at most {threshold}: raise the threshold.")
    return min(int(quiet[0, 0]) + margin, divergence.shape[1] - 1)
