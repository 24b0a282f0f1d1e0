# SPDX-License-Identifier: Apache-2.0
"""Max-sum diversification. Sums of similarities rise and fall, so that no old score bounds a new one.

On the host, picks are drafted in a pool of promising tokens, then all tokens are compared with the drafted picks at
once. A draft holds as far as no other token has a smaller sum.
"""

from __future__ import annotations

from collections.abc import Container

import numpy as np
import torch
from torch import Tensor

from vtoken.ops.common import counts, mask_of
from vtoken.ops.cosines import Cosines
from vtoken.ops.greedy import start_of
from vtoken.ops.lazy import on_host
from vtoken.ops.nearest import only, pick
from vtoken.ops.nested import row_by_row
from vtoken.precision import selection

POOL = 112  # tokens among which picks are drafted
AHEAD = 3  # pools are chosen among so many times their number of tokens with the smallest sums
ALIKE = 4  # tokens of a pool nearest to the same pick: after one of them is picked, the others are far behind
LEAST = 2  # picks that a draft should serve; if it does not, as in features of low rank, all cosines are computed
ALONE = 16  # if that would need more memory than the features, so many picks follow singly instead
SHORT = 1536  # tokens up to which all cosines are computed at once
DRAFT = 16  # columns computed at a time: twice as many cost twice as much, and half as many no less


@selection
def max_sum(features: Tensor, k: int | Tensor, start: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """Max-sum diversification: the smallest sum of cosines to the picks (ToDRE v2, arXiv 2505.18757, Eq. 4-6).

    Parameters, result and errors are those of `k_center`.
    """
    valid = mask_of(features, valid)
    first = only(start_of(start, valid), valid)
    count, cosines = counts(k, valid), Cosines(features, valid)
    if not on_host(valid.device):  # a look at every draft would be a host sync
        return pick(cosines, count, valid, first, add=True)
    return row_by_row(_drafted, cosines, count, valid, first, short=SHORT)


def _drafted(cosines: Cosines, k: Tensor, valid: Tensor, first: Tensor) -> Tensor:
    """(1, k) picks of one row without invalid tokens."""
    if cosines.table is not None:
        return pick(cosines, k, valid, first, add=True)
    tokens, pool = valid.shape[1], _Pool(cosines)
    total, nearest = np.zeros(tokens, np.float32), np.full(tokens, -np.inf, np.float32)
    group = np.zeros(tokens, int)
    ahead: dict[int, np.ndarray] = {}  # columns of drafted tokens that are not picked yet
    picks: list[int] = []
    best = int(first.argmax())
    drafted, resumed = -LEAST, 1  # the picks at which the last draft was made, and from which on the next may be
    while len(picks) < int(k):
        if best not in ahead:
            if len(ahead) > int(k) + DRAFT:
                ahead.clear()
            if len(picks) - drafted < LEAST:
                resumed, cosines = len(picks) + ALONE, cosines.whole(cosines.values.shape[-1])
            if len(picks) < resumed or cosines.table is not None:
                draft = [best]
            else:
                draft, drafted = pool.draft(best, total, group, ahead), len(picks)
            ahead.update(zip(draft, cosines.columns(torch.tensor([draft], device="cpu"))[0].numpy(), strict=True))
        column = ahead.pop(best)
        np.copyto(group, len(picks), where=column > nearest)
        np.maximum(nearest, column, out=nearest)
        total += column
        total[best] = np.inf
        picks.append(best)
        best = int(total.argmin())
    return torch.tensor([picks], device="cpu")


class _Pool:
    """Tokens among which picks are drafted, with the cosines among them; those that stay keep their places."""

    def __init__(self, cosines: Cosines) -> None:
        self.cosines, tokens = cosines, cosines.shape[1]
        self.size = min(POOL, tokens)
        self.tokens = np.full(self.size, tokens)  # a token that does not exist
        self.place = np.full(tokens + 1, -1)  # of each token in the pool
        self.units = cosines.values.new_zeros(self.size, cosines.values.shape[-1])
        self.table = np.zeros((self.size, self.size), np.float32)

    def draft(self, first: int, total: np.ndarray, group: np.ndarray, ahead: Container[int]) -> list[int]:
        """``first`` and the picks after it that are not ``ahead``, if none but those of the pool were to be picked."""
        self._hold(_promising(first, total, group, self.size))
        sums, drafted = total[self.tokens], [first]
        best = int(self.place[first])
        while len(drafted) < DRAFT:
            sums += self.table[best]
            sums[best] = np.inf
            best = int(sums.argmin())
            if sums[best] == np.inf:
                break
            if (token := int(self.tokens[best])) not in ahead:
                drafted.append(token)
        return drafted

    def _hold(self, wanted: np.ndarray) -> None:
        """Put the tokens ``wanted`` (size,) in the places of those that are no longer."""
        held = self.place[wanted]
        new = wanted[held < 0]
        if not len(new):
            return
        left = np.ones(self.size, bool)
        left[held[held >= 0]] = False
        places = np.flatnonzero(left)
        self.place[self.tokens[places]] = -1
        self.tokens[places], self.place[new] = new, places
        units = self.cosines.units(torch.from_numpy(new)[None])[0]
        self.units.index_copy_(0, torch.from_numpy(places), units)
        rows = (units @ self.units.T).numpy()
        self.table[places], self.table[:, places] = rows, rows.T


def _promising(first: int, total: np.ndarray, group: np.ndarray, size: int) -> np.ndarray:
    """(size,) tokens with the smallest sums, ``first`` among them, few of each ``group`` (N,) if others will do."""
    ranked = total.copy()
    ranked[first] = -np.inf
    few = np.argpartition(ranked, min(AHEAD * size, len(ranked)) - 1)[: AHEAD * size]
    few = few[np.lexsort((ranked[few], group[few]))]
    starts = np.flatnonzero(np.diff(group[few], prepend=-1))
    place = np.arange(len(few)) - np.repeat(starts, np.diff(starts, append=len(few)))
    return few[np.lexsort((ranked[few], place >= ALIKE))[:size]]
