# SPDX-License-Identifier: Apache-2.0
"""Visual tokens of each sample: before the reducer, entering the decoder, and averaged over its layers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from vtoken.stats import Stats


@dataclass
class Visual:
    """Visual tokens of one prompt.

    Parameters
    ----------
    visual_tokens : int
        In the prompt.
    visual_kept : int
        Entering the language model.
    visual_per_layer : float
        Averaged over the decoder layers; less than ``visual_kept`` where a method drops tokens inside the decoder.
    """

    visual_tokens: int
    visual_kept: int
    visual_per_layer: float

    def as_dict(self) -> dict[str, Any]:
        """A flat mapping."""
        return asdict(self)


def visual_token_ids(config: Any) -> set[int]:
    """Ids of the placeholders that a model's configuration names."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    return {token for name in names if (token := getattr(config, name, None)) is not None}


def count_unpruned(input_ids: Tensor, config: Any) -> list[Visual]:
    """Placeholders in each row: what an unwrapped model sees."""
    total = sum((input_ids == token).sum(1) for token in visual_token_ids(config))
    numbers = total.tolist() if isinstance(total, Tensor) else [0] * len(input_ids)
    return [Visual(n, n, float(n)) for n in numbers]


def count_pruned(stats: Stats, rows: int, copies: int = 1) -> list[Visual]:
    """Sum the images of each prompt.

    Parameters
    ----------
    stats : Stats
        Of the prefill.
    rows : int
        Prompts in the batch.
    copies : int
        Consecutive rows that stand for one prompt (beams).
    """
    out = [Visual(0, 0, 0.0) for _ in range(rows)]
    starts = [layer for layer, _ in stats.layers]
    ends = [*starts[1:], stats.depth]
    spans = [(end - start, kept) for start, end, (_, kept) in zip(starts, ends, stats.layers, strict=True)]
    for number, image in enumerate(stats.images):
        if image.row % copies:
            continue  # every beam repeats the images of its prompt
        found = out[image.row // copies]
        found.visual_tokens += image.tokens
        found.visual_kept += image.kept
        found.visual_per_layer += sum(span * kept[number] for span, kept in spans) / stats.depth
    return out
