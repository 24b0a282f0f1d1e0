# SPDX-License-Identifier: Apache-2.0
"""Greedy selection by lazy evaluation, for a batch on an accelerator: exact, and most similarities are never computed.

On the host `vtoken.ops.nested` does the same row by row.

Where a pick can only lower the score of the other tokens, an old score bounds the present one from above. So picks are
served from a *pool* of the best tokens, whose scores are kept exact, for as long as the best of the pool is not below
the best old score outside of it. Then all tokens catch up with the picks in one product, and the next pool is formed.
A pool needs its own similarities only; the pools get longer-lived as the scores spread (Minoux's accelerated greedy,
1978, in blocks).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

POOL_ON_DEVICE = 256
"""Tokens in a pool: every pool costs a host sync, so it should serve many picks."""


class Rival(NamedTuple):
    """The best token outside of a pool: its score and number, (B, 1) each."""

    score: Tensor
    token: Tensor


class Pool(Protocol):
    """Tokens whose scores are exact."""

    def scores(self) -> Tensor:
        """(B, P)."""

    def take(self, at: Tensor) -> None:
        """Lower the scores by the picks ``at`` (B, W)."""

    def fused(self, index: Tensor, free: Tensor, rival: Rival, left: Tensor, most: int) -> Tensor | None:
        """What `_serve` returns for single picks, by one kernel; None where there is no such kernel."""


class Bounds(Protocol):
    """Scores of all tokens as of the last `catch_up`."""

    def scores(self) -> Tensor:
        """(B, N)."""

    def pool(self, index: Tensor) -> Pool:
        """The tokens ``index`` (B, P)."""

    def catch_up(self, picks: Tensor, pool: Any) -> None:
        """Lower all scores by ``picks`` (B, M), which were served from ``pool``."""


def lazy_greedy(
    bounds: Bounds, k: Tensor, free: Tensor, picked: Tensor, done: int = 0, parallel: int = 1, width: int = 0
) -> Tensor:
    """Fill ``picked`` from column ``done`` on, always with the free token of the largest score.

    Parameters
    ----------
    bounds : Bounds
        Exact at the start.
    k : Tensor
        (B,) long: picks of each row.
    free : Tensor
        (B, N) bool: tokens to choose from; changed.
    picked : Tensor
        (B, max k) long, -1 where nothing is picked yet; changed.
    parallel : int
        Picks a step; they do not see each other.
    width : int
        Tokens in a pool; by default `POOL_ON_DEVICE`, or all of them if there are not many more.

    Returns
    -------
    Tensor
        ``picked``.
    """
    tokens, longest = free.shape[1], picked.shape[1]
    least = max(POOL_ON_DEVICE, parallel)
    width = width or (tokens if tokens <= 2 * least else least)
    while done < longest:
        scores = bounds.scores().masked_fill(~free, float("-inf"))
        index = best_of(scores, width).sort(dim=1).values  # in order, so that ties go to the lowest token
        outside = scores.scatter(1, index, float("-inf"))
        ahead = best_of(outside, 1)
        rival = Rival(outside.gather(1, ahead), ahead)
        pool = bounds.pool(index)
        at = _serve(pool, index, free.gather(1, index), rival, k - done, longest - done, parallel)
        tokens_taken = index.gather(1, at)
        now = done + torch.arange(at.shape[1], device=k.device)
        picked[:, done : done + at.shape[1]] = torch.where(now < k[:, None], tokens_taken, -1)
        free.scatter_(1, tokens_taken, False)
        done += at.shape[1]
        if done < longest:
            bounds.catch_up(tokens_taken, pool)
    return picked


def _serve(pool: Pool, index: Tensor, free: Tensor, rival: Rival, left: Tensor, most: int, parallel: int) -> Tensor:
    """(B, M) places in the pool of the next picks, up to ``most``; one at least."""
    if parallel == 1 and (found := pool.fused(index, free, rival, left, min(most, free.shape[1]))) is not None:
        return found
    picks: list[Tensor] = []
    late: list[Tensor] = []
    for step in range(0, min(most, free.shape[1]), parallel):
        scores = pool.scores().masked_fill(~free, float("-inf"))
        best = best_of(scores, min(parallel, most - step))
        last = best[:, -1:]
        value = scores.gather(1, last)
        behind = (value < rival.score) | ((value == rival.score) & (index.gather(1, last) > rival.token))
        late.append((behind[:, 0] & (step < left)).any())
        picks.append(best)
        free.scatter_(1, best, False)
        pool.take(best)
    stop = torch.stack(late[1:]).tolist() if len(late) > 1 else []  # one look for the whole pool
    return torch.cat(picks[: 1 + (stop.index(True) if True in stop else len(stop))], 1)


def best_of(scores: Tensor, width: int) -> Tensor:
    """(B, width) long: the tokens with the largest ``scores`` (B, N), the lowest first on ties."""
    if width == 1:
        return scores.argmax(1, keepdim=True)
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :width]


def on_host(device: torch.device) -> bool:
    """Whether a look at a value is free; elsewhere it waits for the queue."""
    return device.type == "cpu"
