# SPDX-License-Identifier: Apache-2.0
"""Evidence recall: which share of the tokens that an answer depends on did a reducer keep?

A document may say where its answer is: ``evidence_boxes`` holds, for each picture (or frame of a clip), boxes
(x0, y0, x1, y1) in pixels. A token bears evidence if it shares at least a quarter of the smaller of its own area and
the box's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vtoken
from vtoken.stats import Stats
from vtoken.tokenmap import TokenMap

SHARE = 0.25
REMEMBERED = 32
"""Batches of different sizes whose tokens' places are kept: pictures of a real benchmark hardly ever repeat theirs."""
Boxes = Sequence[Sequence[Sequence[float]]]  # of one document: pictures, boxes, corners


class EvidenceReader:
    """Knows the tokens' places on the pictures of a model's batches, for each size of them once.

    Parameters
    ----------
    model : nn.Module
        Wrapped or not.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._maps: dict[Any, TokenMap] = {}

    def recalls(
        self, inputs: Mapping[str, Any], visuals: Sequence[Sequence[Any]], evidence: Sequence[Boxes], stats: Stats
    ) -> list[float | None]:
        """Evidence recall of every prompt of the batch that the wrapped model just answered.

        Parameters
        ----------
        inputs : mapping
            What the model was given.
        visuals : sequence
            For each prompt its pictures (PIL) or its clip (frames, height, width, 3).
        evidence : sequence
            For each prompt the boxes on each of its pictures or frames.
        stats : Stats
            Of the prefill.

        Returns
        -------
        list of float or None
            Share of the evidence tokens, averaged over the decoder layers; None where nothing bears evidence.
        """
        places = self._map(inputs, visuals)
        present = _presence(places, stats)
        first = 0
        found: list[float | None] = []
        for row, (shown, boxes) in enumerate(zip(visuals, evidence, strict=True)):
            bearing = torch.zeros(len(places), dtype=torch.bool, device="cpu")
            for number, visual in enumerate(shown):
                tokens = places.image == first + number
                frames = boxes if isinstance(visual, np.ndarray) else [boxes[number]]
                bearing |= tokens & _bears(places, tokens, frames)
            first += len(shown)
            found.append(float(present[bearing].mean()) if bool((bearing & (places.row == row)).any()) else None)
        return found

    def _map(self, inputs: Mapping[str, Any], visuals: Sequence[Sequence[Any]]) -> TokenMap:
        sizes = [size_of(visual) for shown in visuals for visual in shown]
        key = (tuple(len(shown) for shown in visuals), tuple(sizes))
        if key not in self._maps:
            if len(self._maps) == REMEMBERED:
                del self._maps[next(iter(self._maps))]
            self._maps[key] = vtoken.token_map(self.model, inputs, sizes)
        return self._maps[key]


def size_of(visual: Any) -> tuple[int, int]:
    """(height, width) of a picture or clip."""
    if isinstance(visual, np.ndarray):
        return int(visual.shape[-3]), int(visual.shape[-2])
    return int(visual.height), int(visual.width)


def _presence(places: TokenMap, stats: Stats) -> Tensor:
    """(T,) share of the decoder layers in which each token is there."""
    starts = torch.cat([places.image.new_zeros(1), places.image.bincount().cumsum(0)[:-1]])
    slot = torch.arange(len(places), device="cpu") - starts[places.image]
    layers = [layer for layer, _ in stats.kept]
    present = torch.zeros(len(places), dtype=torch.float32, device="cpu")
    for start, end, (_, kept) in zip(layers, [*layers[1:], stats.depth], stats.kept, strict=True):
        present += (end - start) / stats.depth * kept.cpu()[places.image, slot]
    return present


def _bears(places: TokenMap, tokens: Tensor, frames: Boxes) -> Tensor:
    """(T,) bool: tokens of one picture, or of a clip whose time steps show several frames each, that bear evidence."""
    steps = int(places.view[tokens].max()) + 1 if len(frames) > 1 else 1
    bearing = torch.zeros(len(places), dtype=torch.bool, device="cpu")
    for frame, boxes in enumerate(frames):
        if not boxes:
            continue
        hit = _overlap(places.box, torch.tensor(boxes, device="cpu")) >= SHARE
        bearing |= hit & (places.view == frame * steps // len(frames)) if len(frames) > 1 else hit
    return bearing


def _overlap(tokens: Tensor, boxes: Tensor) -> Tensor:
    """(T,) largest shared area with any of ``boxes`` (M, 4), as a share of the smaller one; 0 for separators."""
    low = torch.maximum(tokens[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(tokens[:, None, 2:], boxes[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(2)
    smaller = torch.minimum(_area(tokens)[:, None], _area(boxes)[None])
    return (shared / smaller.clamp(min=1e-6)).nan_to_num(0.0).amax(1)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)
