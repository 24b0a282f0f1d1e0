# SPDX-License-Identifier: Apache-2.0
"""Cosine similarities between tokens, computed where they are needed: no N x N matrix, no normalised copy."""

from __future__ import annotations

import torch
from torch import Tensor

from vtoken.ops.common import EPS, finite

LEAST_CACHED = 1024  # columns that a cache may always hold


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
        self.values = features.float()
        norm = torch.linalg.vector_norm(self.values, dim=-1)
        if not bool(norm.isfinite().all()):  # one pass over (B, N) instead of several over (B, N, D)
            self.values = finite(features, valid, "features")
            norm = torch.linalg.vector_norm(self.values, dim=-1)
        self.inverse = norm.clamp(min=EPS).reciprocal().masked_fill(~valid, 0.0)
        self.nonzero = (norm > 0) & valid

    @property
    def shape(self) -> torch.Size:
        """(B, N)."""
        return self.inverse.shape

    def units(self, index: Tensor) -> Tensor:
        """(B, P, D) unit vectors of the tokens ``index`` (B, P)."""
        rows = self.values[torch.arange(len(index), device=index.device)[:, None], index]
        return rows.mul_(self.inverse.gather(1, index)[..., None])

    def columns(self, index: Tensor) -> Tensor:
        """(B, P, N) cosines of the tokens ``index`` (B, P) and all tokens."""
        return (self.values @ self.units(index).mT).mul_(self.inverse[..., None]).mT  # this way round is fast when thin

    def rows(self, row: int, some: Tensor) -> Tensor:
        """(S, D) features of the tokens ``some`` (S,), in order and each once, of one row; no copy if it is all."""
        return self.values[row] if len(some) == self.values.shape[1] else self.values[row, some]

    def between(self, row: int, rows: Tensor, some: Tensor, others: Tensor) -> Tensor:
        """(S, O) cosines of the tokens ``some`` (S,), whose features are ``rows``, and the few ``others`` (O,)."""
        inverse = self.inverse[row]
        return (rows @ (self.values[row, others] * inverse[others, None]).T).mul_(inverse[some, None])

    def among(self, index: Tensor) -> Tensor:
        """(B, P, P) cosines of the tokens ``index`` (B, P)."""
        units = self.units(index)
        return units @ units.mT


class CachedColumns:
    """Columns of cosines that stay in memory, fetched together with those that are likely to be wanted next.

    Parameters
    ----------
    cosines : Cosines
        Of B rows of N tokens.
    picks : int
        Picks to come: about four columns a pick are held before the cache starts over.
    block : int
        Columns fetched at a time.
    """

    def __init__(self, cosines: Cosines, picks: int, block: int) -> None:
        size, tokens = cosines.shape
        self.cosines, self.block = cosines, min(block, tokens)
        self.room = max(4 * picks, LEAST_CACHED)
        self.place = torch.full((size, tokens), -1, dtype=torch.long, device=cosines.inverse.device)
        self.tables: list[Tensor] = []
        self.held = 0

    def __call__(self, wanted: Tensor, scores: Tensor) -> Tensor:
        """Columns (B, P, N) of ``wanted`` (B, P); the best others by ``scores`` (B, N) are fetched with them."""
        place = self.place.gather(1, wanted)
        if bool((place < 0).any()):
            self._fetch(wanted, scores)
            place = self.place.gather(1, wanted)
        return torch.stack([self._row(row, place[row]) for row in range(len(wanted))])

    def _row(self, row: int, place: Tensor) -> Tensor:
        return torch.stack([self.tables[at // self.block][row, at % self.block] for at in place.tolist()])

    def _fetch(self, wanted: Tensor, scores: Tensor) -> None:
        if self.held + self.block > self.room:
            self.place.fill_(-1)
            self.tables, self.held = [], 0
        order = scores.masked_fill(self.place >= 0, float("-inf"))
        missing = self.place.gather(1, wanted) < 0
        order = order.scatter(1, wanted, torch.where(missing, float("inf"), order.gather(1, wanted)))
        index = order.topk(self.block, dim=1).indices
        self.tables.append(self.cosines.columns(index))
        at = self.held + torch.arange(self.block, device=index.device)
        self.place.scatter_(1, index, at.expand_as(index))
        self.held += self.block
