# SPDX-License-Identifier: Apache-2.0
"""Which visual tokens are neighbours on the grid, and the band of keys that a block of them needs.

Pure tensor functions. B rows, n tokens in the longest of them, in the order of the sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128
"""Queries that share a band of keys."""


class Bands(NamedTuple):
    """Blocks of T consecutive queries and the W consecutive keys that each of them needs.

    Attributes
    ----------
    queries : Tensor
        (blocks, T) long; behind the last query they go on counting.
    keys : Tensor
        (blocks, W) long.
    """

    queries: Tensor
    keys: Tensor


def neighbours(view: Tensor, row: Tensor, column: Tensor, window: int) -> Tensor:
    """Pairs of tokens of one view that are at most ``(window - 1) // 2`` rows and columns apart.

    Parameters
    ----------
    view, row, column : Tensor
        (B, n) long.

    Returns
    -------
    Tensor
        (B, n, n) bool.
    """
    reach = (window - 1) // 2

    def close(x: Tensor, distance: int) -> Tensor:
        x = x.int()  # half the memory of n x n pairs
        return (x[:, :, None] - x[:, None]).abs() <= distance

    return close(view, 0) & close(row, reach) & close(column, reach)


def bands(pairs: Tensor, block: int = BLOCK) -> Bands:
    """Bands that hold every pair (query, key) of ``pairs`` (B, n, n) bool."""
    n = pairs.shape[1]
    at = torch.arange(n, device=pairs.device)
    if n <= block:
        return Bands(at[None], at[None])
    some = pairs.any(2)
    marks = pairs.to(torch.uint8)
    back = (at - marks.argmax(2)).masked_fill(~some, 0).amax()
    forward = (n - 1 - marks.flip(2).argmax(2) - at).masked_fill(~some, 0).amax()
    back, forward = (max(0, reach) for reach in torch.stack([back, forward]).tolist())
    if block + back + forward >= n:
        return Bands(at[None], at[None])
    width = block + back + forward
    start = torch.arange(0, n, block, device=pairs.device)[:, None]
    first = (start - back).clamp(0, n - width)
    return Bands(start + at[:block], first + at[:width])
