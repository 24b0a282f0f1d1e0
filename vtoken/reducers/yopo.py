# SPDX-License-Identifier: Apache-2.0
"""YOPO: fewer keys, neurons, heads and layers for visual tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vtoken.context import Cut, VisualContext
from vtoken.light import LightLayer
from vtoken.reducers.base import Reducer
from vtoken.reducers.checks import check_count, check_number, check_place, layer_at
from vtoken.reducers.heads import HeadRatios, Heads, active_heads, check_heads
from vtoken.registry import register


@register("yopo")
@dataclass(frozen=True)
class YOPO(Reducer):
    """Treat visual tokens as text? (arXiv 2410.06169): compute less for visual tokens instead of dropping them.

    The training-free port of the four prunings (Sec. 3): attention among visual tokens within a window of the grid,
    inactive heads, a sparse feed-forward network, and no visual computation in the last layers. The authors fine-tune
    the pruned LLaVA-1.5, and apply it as it is to Qwen2-VL and InternVL2.

    It differs from their code, which simulates by masks and saves nothing: rows, heads, neurons and keys are really
    left out; the window is causal (theirs shows visual tokens later neighbours); from ``drop_layer`` on the tokens are
    dropped, so that text attends to text with weights that sum to 1 (theirs zeroes them after the softmax); text rows
    read visual tokens in all heads, so that decoding needs no mask.

    Parameters
    ----------
    window : int or None
        Side of the square on the token grid of a view in which visual tokens attend to each other: of 5 cells for 5,
        and for 6. None: all of them. It saves time in large pictures only.
    ffn : float
        Leading share in (0, 1] of the neurons of the feed-forward network that visual tokens use.
    drop_layer : int, float or None
        First layer without visual tokens, at least 1, or a share of the depth; None: no such layer.
    heads : tuple of tuple of bool, or None
        One tuple per decoder layer: the heads in which visual rows attend, see `calibrate`. None: all heads.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """

    summary = "Visual tokens attend to neighbours, use half of the neurons, and stop at a fixed layer."
    paper = "2410.06169"

    window: int | None = 5
    ffn: float = 0.5
    drop_layer: int | float | None = 0.5
    heads: Heads | None = None

    def __post_init__(self) -> None:
        if self.window is not None:
            check_count("window", self.window)
        check_number("ffn", self.ffn, 0, 1, above=True)
        if self.drop_layer is not None:
            check_place("drop_layer", self.drop_layer, least=1)
        if self.heads is not None:
            object.__setattr__(self, "heads", check_heads(self.heads))

    @property
    def is_identity(self) -> bool:
        return self.window is None and self.ffn == 1 and self.drop_layer is None and self.heads is None

    def layers(self, depth: int) -> tuple[int, ...]:
        return () if self.drop_layer is None else (max(1, layer_at(self.drop_layer, depth)),)

    def at_layer(self, layer: int, ctx: VisualContext) -> Cut | None:
        """Drop everything."""
        return Cut(ctx.valid & False)

    def light_layers(self, depth: int) -> dict[int, LightLayer]:
        """All layers that still have visual tokens.

        Raises
        ------
        ValueError
            If ``heads`` are those of a decoder of another depth.
        """
        if self.heads is not None and len(self.heads) != depth:
            raise ValueError(
                f"heads={len(self.heads)} layers, but the decoder has {depth}: calibrate on this model "
                "(vtoken.YOPO.calibrate)."
            )
        if self.window is None and self.ffn == 1 and self.heads is None:
            return {}
        last = min((depth, *self.layers(depth)))
        heads = [None if self.heads is None or all(self.heads[layer]) else self.heads[layer] for layer in range(last)]
        return {layer: LightLayer(True, self.ffn, self.window, heads[layer]) for layer in range(last)}

    @staticmethod
    def calibrate(
        model: nn.Module,
        samples: Iterable[Mapping[str, Any]],
        threshold: float,
        majority: float = 0.4,
        keep_first: int = 2,
    ) -> Heads:
        """Find the heads that are active for visual tokens (Sec. 3.2), from forward passes on the unpruned model.

        Parameters
        ----------
        model : nn.Module
            Unwrapped.
        samples : iterable of mapping
            Arguments of the model's forward with pictures; every row of a batch counts as a sample. The authors
            take 100.
        threshold, majority, keep_first
            See `active_heads`.

        Returns
        -------
        tuple of tuple of bool
            The parameter ``heads``.

        Raises
        ------
        ValueError
            If there is no sample, or one has no picture.
        """
        from vtoken.wrapping import reduce

        watcher, ratios = HeadRatios(), []
        with reduce(model, watcher), torch.inference_mode():
            for sample in samples:
                model(**sample, use_cache=False)
                ratios.append(watcher.take())
        if not ratios:
            raise ValueError("samples is empty: calibration needs at least one sample with a picture.")
        return active_heads(torch.cat(ratios), threshold, majority, keep_first)
