# SPDX-License-Identifier: Apache-2.0
"""Max-min selection, and the token farthest from its nearest neighbour, with which it starts."""

from __future__ import annotations

import torch
from torch import Tensor

from vtoken.ops.common import counts, mask_of
from vtoken.ops.cosines import CHUNK, Cosines
from vtoken.ops.lazy import on_host
from vtoken.ops.nearest import only, pick
from vtoken.ops.nested import row_by_row
from vtoken.precision import selection

BLOCK = 384  # tokens that meet as many others at a time
PART = 512  # tokens of all that the last in the race meet at a time
FINAL = 32  # of them, whose nearest neighbours are found at once
SHORT = 1280  # tokens up to which all cosines are computed at once
ROUNDING = 1e-5  # by which cosines from products of other shapes may differ


@selection
def max_min(features: Tensor, k: int | Tensor, valid: Tensor | None = None) -> Tensor:
    """Max-min selection that starts at the token farthest from its nearest neighbour (DivPrune, arXiv 2503.02175).

    Picked tokens leave the choice, so identical tokens give no duplicates. Parameters, result and errors are those of
    `k_center`.
    """
    valid = mask_of(features, valid)
    cosines = Cosines(features, valid)
    if on_host(valid.device):
        return row_by_row(_from_most_isolated, cosines, counts(k, valid), valid, short=SHORT)
    return pick(cosines, counts(k, valid), valid, -nearest_similarity(cosines, valid))


def _from_most_isolated(cosines: Cosines, k: Tensor, valid: Tensor) -> Tensor:
    """(1, k) picks of one row without invalid tokens."""
    return pick(cosines, k, valid, only(torch.tensor([most_isolated(cosines)], device="cpu"), valid))


def nearest_similarity(cosines: Cosines, valid: Tensor) -> Tensor:
    """(B, N): cosine of each token and its nearest other valid token; -1 if it is alone."""
    tokens = torch.arange(cosines.shape[1], device=valid.device)
    parts = []
    for rows in tokens.split(CHUNK):
        near = cosines.columns(rows.expand(len(valid), -1))
        near.masked_fill_(~valid[:, None, :] | (rows[:, None] == tokens), -1.0)
        parts.append(near.amax(2))
    return torch.cat(parts, 1)


def most_isolated(cosines: Cosines) -> int:
    """The token of one row with the smallest `nearest_similarity`, without computing it for all of a long one."""
    if cosines.table is not None:
        return int(cosines.table[0].clone().fill_diagonal_(-1.0).amax(1).argmin())
    race = _Race(cosines)
    race.among_each_other()
    race.against_all()
    return race.best[1]


class _Race:
    """Tokens leave once they met one that they are nearer to than the best is to any, or are compared with all.

    Attributes
    ----------
    racing : Tensor
        (R,) long: tokens that may be the most isolated one.
    found : Tensor
        (R,): the largest similarity of each to those that it met.
    best : (float, int)
        The smallest similarity to the nearest neighbour that is known, and whose it is.
    """

    def __init__(self, cosines: Cosines) -> None:
        self.cosines = self.rows = cosines
        self.racing = torch.arange(cosines.shape[1], device="cpu")
        self.found = torch.full((cosines.shape[1],), -1.0, dtype=torch.float32, device="cpu")
        self.best = float("inf"), -1
        self.random = torch.Generator().manual_seed(0)

    def among_each_other(self) -> None:
        """Each product tells about both of its sides, until there are few left or hardly any leave."""
        distance = half = 0
        while len(self.racing) > BLOCK and distance <= half:
            blocks = torch.arange(len(self.racing), device="cpu").split(BLOCK)
            half = (len(blocks) + 1) // 2
            for i in range(half):
                if (j := (i + half + distance) % len(blocks)) != i:
                    self._meet(blocks[i], blocks[j])
            distance = 0 if self._leave(at_least=0.5, shuffled=True) else distance + 1

    def against_all(self) -> None:
        """Those that are left meet everyone, part by part."""
        for others in self._shuffled(self.cosines.shape[1]).split(PART):
            if len(self.racing) <= FINAL:
                return self._finish(torch.arange(len(self.racing), device="cpu"))
            near = self.rows.facing(self.cosines.part(0, others))
            near.masked_fill_(self.racing[:, None] == others, -1.0)
            self.found = torch.maximum(self.found, near.amax(1))
            self._leave()
        self._compared(self.found, self.racing)

    def _shuffled(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.random, device="cpu")

    def _meet(self, some: Tensor, others: Tensor) -> None:
        near = self.rows.part(0, some).facing(self.rows.part(0, others))
        self.found[some] = torch.maximum(self.found[some], near.amax(1))
        self.found[others] = torch.maximum(self.found[others], near.amax(0))

    def _leave(self, at_least: float = 0.0, shuffled: bool = False) -> bool:
        """Compare the most promising with all, then go on without those that cannot win, if they are ``at_least`` a
        share: copying the rows of the others has its cost."""
        self._finish(self.found.topk(min(FINAL, len(self.racing)), largest=False).indices)
        ahead = (self.found <= self.best[0] + ROUNDING).nonzero()[:, 0]
        if len(ahead) > (1 - at_least) * len(self.racing):
            return False
        if shuffled:
            ahead = ahead[self._shuffled(len(ahead))]
        self.racing, self.found = self.racing[ahead], self.found[ahead]
        if len(ahead):
            self.rows = self.rows.part(0, ahead)
        return True

    def _finish(self, few: Tensor) -> None:
        """Compare the tokens ``few`` (F,) of the race with all; they leave it."""
        tokens = self.racing[few]
        near = self.cosines.columns(tokens[None])[0].scatter(1, tokens[:, None], -1.0).amax(1)
        self._compared(near, tokens)
        self.found[few] = float("inf")

    def _compared(self, near: Tensor, tokens: Tensor) -> None:
        """Some ``tokens`` met all others; ties go to the lowest."""
        self.best = min([self.best, *zip(near.tolist(), tokens.tolist(), strict=True)])
