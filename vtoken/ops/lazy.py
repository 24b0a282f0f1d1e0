# SPDX-License-Identifier: Apache-2.0
"""Greedy picks by lazy evaluation, for one row on the host: exact, and most similarities are never computed.

Where a pick can only lower the score of the other tokens, an old score bounds the present one from above. So picks are
served from a *pool* of the best tokens, whose scores are kept exact, for as long as the best of the pool is not below
the best old score outside of it. Then all tokens catch up with the picks in one product, and the next pool is formed.
A pool needs its own similarities only; the pools get longer-lived as the scores spread (Minoux's accelerated greedy,
1978, in blocks).

Everything runs in one thread: the steps are small. In numpy they cost a fraction of torch's.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vtoken.ops.cosines import Cosines
from vtoken.ops.loop import best_of, joined, one_thread

POOL = 192
"""Tokens in a pool: enough to serve many picks, few enough that their own similarities cost little."""
WHOLE = 3
"""Up to so many pools, all tokens are one."""


class Rival(NamedTuple):
    """The best token outside of a pool: its score, and its number, as ties go to the lowest."""

    score: float
    token: int

    def beats(self, score: float, token: int) -> bool:
        return score < self.score or (score == self.score and token > self.token)


def pick_lazily(
    cosines: Cosines, k: Tensor, valid: Tensor, first: Tensor, offset: Tensor, slope: Tensor, parallel: int = 1
) -> Tensor:
    """What `pick_each` returns without ``add``, for one row without invalid tokens and ``slope`` of at least 0."""
    most, tokens = int(k), valid.shape[1]
    width = max(POOL, parallel)
    width = tokens if tokens <= WHOLE * width else width
    with one_thread(k.device, tokens):
        picks = best_of(first, min(parallel, most))
        parts, done = [picks], picks.shape[1]
        closed = torch.zeros_like(first).scatter_(1, picks, float("-inf"))
        state = None
        while done < most:
            state = joined(state, cosines.columns(picks))
            bounds = offset - slope * state + closed
            index = best_of(bounds, width).sort(dim=1).values  # in order, so that ties go to the lowest
            outside = bounds.scatter(1, index, float("-inf"))[0]
            rival = Rival(float(outside.max()), int(outside.argmax()))
            pool = _Pool(cosines, index, *(x.gather(1, index) for x in (closed, offset, slope, state)))
            picks = index.gather(1, pool.serve(most - done, parallel, rival))
            closed.scatter_(1, picks, float("-inf"))
            parts.append(picks)
            done += picks.shape[1]
    return torch.cat(parts, 1)


class _Pool:
    """Tokens whose scores are exact, with the similarities among them."""

    def __init__(self, cosines: Cosines, index: Tensor, *scores: Tensor) -> None:
        self.tokens, self.table = index[0].numpy(), cosines.among(index)[0].numpy()
        self.closed, self.offset, self.slope, self.state = (every[0].numpy() for every in scores)

    def serve(self, most: int, parallel: int, rival: Rival) -> Tensor:
        """(1, M) places in the pool of the next picks; one step at least."""
        picks: list[int] = []
        while len(picks) < most:
            scores = self.offset - self.slope * self.state + self.closed
            if parallel == 1:
                best = [int(scores.argmax())]
            else:
                best = np.argsort(-scores, kind="stable")[: min(parallel, most - len(picks))].tolist()
            if picks and rival.beats(float(scores[best[-1]]), int(self.tokens[best[-1]])):
                break
            picks += best
            self.closed[best] = -np.inf
            self.state = np.maximum(self.state, self.table[best].max(0))
        return torch.tensor([picks], device="cpu")
