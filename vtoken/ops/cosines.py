# SPDX-License-Identifier: Apache-2.0
"""Cosine similarities between tokens: all of them in one table, or columns of it where it would be too large."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from vtoken.ops.common import EPS, finite
from vtoken.ops.ragged import gather

CHUNK = 512  # rows of similarities held at a time
DENSE = 3072  # tokens whose table (36 MB) is kept however few features they have
FEW = 6  # columns that are computed as rows: the other way round is as slow for one as for sixteen


class Cosines:
    """Cosines of the tokens of each row.

    Parameters
    ----------
    features : Tensor
        (B, N, D).
    valid : Tensor
        (B, N) bool; all others have cosine 0 with everything.

    Raises
    ------
    ValueError
        If a valid token has a feature that is not finite.
    """

    def __init__(self, features: Tensor, valid: Tensor) -> None:
        self.values = features.float().contiguous()
        norm = torch.linalg.vector_norm(self.values, dim=-1)
        if not bool(norm.isfinite().all()):  # one pass over (B, N) instead of several over (B, N, D)
            self.values = finite(features, valid, "features")
            norm = torch.linalg.vector_norm(self.values, dim=-1)
        self.inverse = norm.clamp(min=EPS).reciprocal().masked_fill(~valid, 0.0)
        self.nonzero = (norm > 0) & valid
        self.table: Tensor | None = None  # (B, N, N)

    @property
    def shape(self) -> torch.Size:
        """(B, N)."""
        return self.inverse.shape

    @property
    def read(self) -> int:
        """Numbers that are read for a column of one row."""
        return self.shape[1] if self.table is not None else self.values[0].numel()

    def part(self, row: int, tokens: Tensor) -> Cosines:
        """Of the tokens ``tokens`` (S,) of one row; their features are copied unless they follow each other."""
        chosen = slice(int(tokens[0]), int(tokens[-1]) + 1) if _in_a_row(tokens) else tokens
        found = copy.copy(self)
        found.table = None
        found.values, found.inverse, found.nonzero = (
            every[row][chosen][None] for every in (self.values, self.inverse, self.nonzero)
        )
        return found

    def whole(self) -> Cosines:
        """With all of them computed; as they are where a table would be large, and larger than the features."""
        rows, tokens = self.shape
        if self.table is not None or rows * tokens**2 > max(DENSE**2, self.values.numel()):
            return self
        found = copy.copy(self)
        found.table = (self.values @ self.values.mT).mul_(self.inverse[:, None]).mul_(self.inverse[..., None])
        return found

    def units(self, index: Tensor) -> Tensor:
        """(B, P, D) unit vectors of the tokens ``index`` (B, P)."""
        return gather(self.values, index).mul_(self.inverse.gather(1, index)[..., None])

    def columns(self, index: Tensor) -> Tensor:
        """(B, P, N) cosines of the tokens ``index`` (B, P) and all tokens."""
        if self.table is not None:
            return gather(self.table, index)
        if index.shape[1] <= FEW:
            return (self.units(index) @ self.values.mT).mul_(self.inverse[:, None])
        return (self.values @ self.units(index).mT).mul_(self.inverse[..., None]).mT  # this way round is fast when thin

    def among(self, index: Tensor) -> Tensor:
        """(B, P, P) cosines of the tokens ``index`` (B, P)."""
        if self.table is not None:
            return gather(gather(self.table, index), index, dim=2)
        units = self.units(index)
        return units @ units.mT


def _in_a_row(tokens: Tensor) -> bool:
    return len(tokens) > 0 and bool((tokens.diff() == 1).all())
