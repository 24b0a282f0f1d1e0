# SPDX-License-Identifier: Apache-2.0
"""Which attention heads are active for visual tokens: YOPO's calibration (arXiv 2410.06169, Sec. 3.2)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtoken.context import Cut, VisualContext
from vtoken.reducers.base import Reducer
from vtoken.reducers.checks import check_count, check_number

Heads = tuple[tuple[bool, ...], ...]
"""For each decoder layer, whether each of its heads is active for visual tokens."""


@dataclass(frozen=True)
class HeadRatios(Reducer):
    """Drops nothing; measures how the attention of each head is shared out between visual tokens and text.

    The rows counted are those of the question, the text behind the last visual token: which rows the authors count is
    not known.
    """

    name = "head-ratios"

    def __post_init__(self) -> None:
        object.__setattr__(self, "_seen", [])

    def layers(self, depth: int) -> tuple[int, ...]:
        return (depth,)

    def at_layer(self, layer: int, ctx: VisualContext) -> Cut | None:
        """Measure, behind the last layer."""
        shares = []
        for rows in (ctx.attention[layer] for layer in range(ctx.depth)):
            received = (rows.probabilities.float() * rows.valid[:, None, :, None]).sum(2)
            visual, text = (received * here[:, None].to(received.device) for here in (ctx.visual, ctx.text))
            shares.append((visual.sum(2) / text.sum(2)).cpu())
        self._seen.append(torch.stack(shares, 1)[ctx.visual.any(1).cpu()])  # type: ignore[attr-defined]
        return None

    def taps(self, depth: int) -> dict[int, str]:
        return dict.fromkeys(range(depth), "question")

    def take(self) -> Tensor:
        """(B, L, H): attention to visual tokens over attention to text, in the rows of the last prompt with pictures.

        Raises
        ------
        ValueError
            If the last prompt had no picture.
        """
        if not self._seen:  # type: ignore[attr-defined]
            raise ValueError("A calibration sample has no picture: pass what the processor returns for one.")
        return self._seen.pop()  # type: ignore[attr-defined]


def active_heads(ratios: Tensor, threshold: float, majority: float = 0.4, keep_first: int = 2) -> Heads:
    """Heads that a share of the samples finds active.

    Parameters
    ----------
    ratios : Tensor
        (samples, L, H): attention to visual tokens over attention to text.
    threshold : float
        A head is active in a sample whose ratio is larger. The authors': LLaVA-1.5-13B 0.2, 0.077 and 0.035 for 10,
        20 and 30 % of the heads dropped; InternVL2-4B 0.08, -8B 0.11, -26B 0.052; Qwen2-VL 0.07.
    majority : float
        Share of the samples that must be exceeded; the authors' 40 of 100.
    keep_first : int
        Layers all of whose heads are active.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """
    check_number("threshold", threshold, 0)
    check_number("majority", majority, 0, 1)
    check_count("keep_first", keep_first, least=0)
    active = (ratios > threshold).double().mean(0) > majority
    active[:keep_first] = True
    return tuple(tuple(layer) for layer in active.tolist())


def check_heads(heads: Any) -> Heads:
    """The mask as tuples of bool.

    Raises
    ------
    ValueError
        If it is no table of true and false (1 and 0), a row for each decoder layer.
    """
    if isinstance(heads, str) or not isinstance(heads, Iterable) or not (rows := list(heads)):
        raise ValueError(f"heads={heads!r}: give one list of true and false per decoder layer.")
    found = []
    for number, row in enumerate(rows):
        values = list(row) if isinstance(row, Iterable) else []
        if not values or any(value not in (0, 1) for value in values):
            raise ValueError(f"heads of layer {number} are {row!r}: give true or false for each head.")
        found.append(tuple(bool(value) for value in values))
    return tuple(found)
