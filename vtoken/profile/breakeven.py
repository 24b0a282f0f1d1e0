# SPDX-License-Identifier: Apache-2.0
"""From how many visual tokens on a reducer pays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Point(NamedTuple):
    """One measurement: visual tokens a prompt, and milliseconds of prefill without and with the reducer."""

    tokens: int
    unpruned: float
    reduced: float
    selection: float


def break_even(points: Sequence[Point]) -> float | None:
    """Visual tokens a prompt at which the prefill saves what the selection costs.

    Straight lines are fitted to the selection's time and to the time that the rest of the prefill saves, over the
    number of visual tokens; the result is where they cross. 0: it pays at once; None: within the measured range the
    saving does not grow faster than the cost, so it never pays.

    Raises
    ------
    ValueError
        If there are less than two token counts.
    """
    tokens = np.array([point.tokens for point in points], dtype=float)
    if len(set(tokens.tolist())) < 2:
        raise ValueError(f"A break-even needs at least two token counts, not {sorted(set(tokens.tolist()))}.")
    cost = np.polyfit(tokens, [point.selection for point in points], 1)
    saved = np.polyfit(tokens, [point.unpruned - (point.reduced - point.selection) for point in points], 1)
    slope, start = saved - cost
    if start >= 0:
        return 0.0 if start + slope * tokens.max() >= 0 else None
    return float(-start / slope) if slope > 0 else None
