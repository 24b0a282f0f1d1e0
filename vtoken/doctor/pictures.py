# SPDX-License-Identifier: Apache-2.0
"""The doctor's own pictures: drawn, so that nothing has to be downloaded and nothing of the user's is in a report."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels."""


def picture(height: int, width: int, seed: int = 0) -> Picture:
    """(height, width, 3): a shaded ground with coloured rectangles of several sizes."""
    rng = np.random.default_rng(seed)
    rows, columns = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
    ground = [70 + 90 * (a * rows + (1 - a) * columns) for a in rng.random(3)]
    out = np.stack(np.broadcast_arrays(*ground), -1)
    for _ in range(24):
        y, x = rng.integers(0, height), rng.integers(0, width)
        h, w = rng.integers(height // 32 + 1, height // 4 + 2), rng.integers(width // 32 + 1, width // 4 + 2)
        out[y : y + h, x : x + w] = rng.integers(0, 256, 3)
    return out.astype(np.uint8)


def painted(base: Picture, box: Box) -> Picture:
    """The picture with the colours of a place turned into their opposites, pushed to the ends of the range."""
    x0, y0, x1, y1 = (round(value) for value in box)
    out = base.copy()
    place = out[y0:y1, x0:x1]
    place[:] = np.where(place < 128, 255, 0)
    return out
