# SPDX-License-Identifier: Apache-2.0
"""Lazy greedy selection on the host: one row, a look at a value is free, and pools lie inside of pools.

Late pools live long, and what all tokens would have to catch up with grows. So once a pool served many picks, the best
quarter of the tokens is copied and the next pools are formed among these alone, for as long as the best of them is not
behind the others. Only then does everything else catch up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from vtoken.ops.lazy import Bounds, Pool, best_of, on_host

POOL = 128
"""Tokens in a pool: enough to serve many picks, few enough that their own similarities cost little."""
ACTIVE = 4
"""The outer pool holds one token out of so many."""
LONG = 12
"""Picks of a pool from which on an outer pool pays."""


class RowPool(Protocol):
    """A pool of one row in numpy, where steps of a few hundred numbers cost a fraction of torch's."""

    def scores(self) -> np.ndarray:
        """(P,)."""

    def take(self, at: int) -> None:
        """Lower the scores by a pick."""


class NestedPool(Pool, Protocol):
    """A pool that can be served in numpy."""

    def row(self) -> RowPool:
        """Its only row."""


class NestedBounds(Bounds, Protocol):
    """Bounds that can be taken of a part of the tokens."""

    def pool(self, index: Tensor) -> NestedPool:
        """The tokens ``index`` (1, P)."""

    def narrow(self, index: Tensor) -> NestedBounds:
        """Those of the tokens ``index`` (1, P)."""


class Rival(NamedTuple):
    """The best token outside of a pool: its score, and its number, as ties go to the lowest."""

    score: float
    token: int

    def beats(self, score: float, token: int) -> bool:
        return score < self.score or (score == self.score and token > self.token)


NOBODY = Rival(float("-inf"), -1)


def row_by_row(
    pick: Callable[..., Tensor], cosines: Any, k: Tensor, valid: Tensor, *values: Tensor, short: int = 0
) -> Tensor:
    """Picks (B, max k) of ``pick(cosines, k, valid, *values)``, on the host of each row without its invalid tokens.

    The products of padded rows would cost as much as those of tokens. Rows of at most ``short`` tokens get a table of
    all similarities.
    """
    if not on_host(valid.device):
        return pick(cosines, k, valid, *values)
    if len(k) == 1 and bool(valid.all()):
        return pick(cosines.whole(short), k, valid, *values)
    picked = k.new_full((len(k), int(k.max())), -1)
    for row, mask in enumerate(valid):
        if k[row]:
            tokens = mask.nonzero()[:, 0]
            parts = [x[row : row + 1, tokens] for x in (valid, *values)]
            found = pick(cosines.part(row, tokens).whole(short), k[row : row + 1], *parts)[0]
            picked[row, : len(found)] = tokens[found]
    return picked


def nested_greedy(
    bounds: NestedBounds,
    free: Tensor,
    most: int,
    parallel: int = 1,
    width: int = 0,
    rival: Rival = NOBODY,
    tokens: Tensor | None = None,
) -> Tensor:
    """Places of the next picks, always the free token of the largest score, until they fall behind a rival.

    Parameters
    ----------
    bounds : NestedBounds
        Of one row; exact at the start.
    free : Tensor
        (1, N) bool: tokens to choose from; changed.
    most : int
        Picks at most; no more than there are free tokens.
    parallel : int
        Picks a step; they do not see each other.
    width : int
        Tokens in a pool; by default `POOL`, or all of them if there are not many more.
    rival : Rival
        The first step is made in any case.
    tokens : Tensor, optional
        (N,) long: numbers by which ties are decided, in order.

    Returns
    -------
    Tensor
        (1, M) long.
    """
    size = free.shape[1]
    tokens = torch.arange(size, device="cpu") if tokens is None else tokens
    least = max(POOL, parallel)
    width = width or (size if size <= 2 * least else least)
    parts: list[Tensor] = []
    done = served = 0
    while done < most:
        scores = bounds.scores().masked_fill(~free, float("-inf"))
        if done and _behind(scores, min(parallel, most - done), rival, tokens):
            break
        outer = served >= LONG and size // ACTIVE > 2 * width
        index = best_of(scores, size // ACTIVE if outer else width).sort(dim=1).values  # so that ties go to the lowest
        ahead = max(rival, _best(scores.scatter(1, index, float("-inf")), tokens), key=lambda r: (r.score, -r.token))
        names, chosen, left = tokens[index[0]], free.gather(1, index), most - done
        if outer:
            pool: Any = bounds.narrow(index)
            at = nested_greedy(pool, chosen, left, parallel, width, ahead, names)
        else:
            pool = bounds.pool(index)
            at = _serve(pool, chosen, left, parallel, ahead, names)
        taken = index.gather(1, at)
        free.scatter_(1, taken, False)
        parts.append(taken)
        served = taken.shape[1]
        done += served
        if done < most:
            bounds.catch_up(taken, pool)
    return torch.cat(parts, 1)


def _serve(pool: NestedPool, free: Tensor, most: int, parallel: int, rival: Rival, tokens: Tensor) -> Tensor:
    """(1, M) places in the pool of the next picks; one step at least."""
    if parallel == 1:
        return _serve_singly(pool.row(), free, most, rival, tokens)
    closed = torch.zeros_like(free, dtype=torch.float32).masked_fill_(~free, float("-inf"))
    picks: list[Tensor] = []
    for step in range(0, min(most, free.shape[1]), parallel):
        scores = pool.scores() + closed
        best = best_of(scores, min(parallel, most - step))
        last = int(best[0, -1])
        if step and rival.beats(float(scores[0, last]), int(tokens[last])):
            break
        picks.append(best)
        closed.scatter_(1, best, float("-inf"))
        pool.take(best)
    return torch.cat(picks, 1)


def _serve_singly(row: RowPool, free: Tensor, most: int, rival: Rival, tokens: Tensor) -> Tensor:
    """What `_serve` returns for one pick a step."""
    closed = np.where(free[0].numpy(), np.float32(0), np.float32("-inf"))
    picks: list[int] = []
    while len(picks) < min(most, free.shape[1]):
        scores = row.scores() + closed
        best = int(scores.argmax())
        if picks and rival.beats(float(scores[best]), int(tokens[best])):
            break
        picks.append(best)
        closed[best] = float("-inf")
        row.take(best)
    return torch.tensor([picks], device="cpu")


def _best(scores: Tensor, tokens: Tensor) -> Rival:
    best = int(scores.argmax())
    return Rival(float(scores[0, best]), int(tokens[best]))


def _behind(scores: Tensor, step: int, rival: Rival, tokens: Tensor) -> bool:
    last = int(best_of(scores, step)[0, -1])
    return rival.beats(float(scores[0, last]), int(tokens[last]))
