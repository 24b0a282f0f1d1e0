# SPDX-License-Identifier: Apache-2.0
"""Greedy picks in the plain way: all cosines in one product, then one pick after the other, without looking at a value.

On a GPU with Triton the picks of a row are made by one kernel. What the scores are is the caller's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vtoken.ops import triton_greedy
from vtoken.ops.common import first_picks
from vtoken.ops.cosines import Cosines

SMALL = 1 << 23
"""Numbers that are read in a millisecond or two: steps of more gain from several threads."""


def on_host(device: torch.device) -> bool:
    """Whether a look at a value is free; elsewhere it waits for the queue."""
    return device.type == "cpu"


@contextlib.contextmanager
def one_thread(device: torch.device, numbers: int) -> Iterator[None]:
    """On the host, many small steps, each of which reads so many ``numbers``, in a single thread.

    A second one saves them microseconds; beside other processes, each step would wait until both are run again.
    """
    before = torch.get_num_threads()
    if not on_host(device) or numbers > SMALL or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def row_by_row(pick: Callable[..., Tensor], cosines: Cosines, k: Tensor, valid: Tensor, *values: Tensor) -> Tensor:
    """Picks (B, max k) of ``pick(cosines, k, valid, *values)``, on the host of each row without its invalid tokens.

    The products of padded rows would cost as much as those of tokens.
    """
    if not on_host(valid.device) or (len(k) == 1 and bool(valid.all())):
        return pick(cosines, k, valid, *values)
    picked = k.new_full((len(k), int(k.max())), -1)
    for row, mask in enumerate(valid):
        if k[row]:
            tokens = mask.nonzero()[:, 0]
            parts = [x[row : row + 1, tokens] for x in (valid, *values)]
            found = pick(cosines.part(row, tokens), k[row : row + 1], *parts)[0]
            picked[row, : len(found)] = tokens[found]
    return picked


def pick_each(
    cosines: Cosines,
    k: Tensor,
    valid: Tensor,
    first: Tensor,
    offset: Tensor,
    slope: Tensor,
    parallel: int = 1,
    add: bool = False,
) -> Tensor:
    """Picks (B, max k): the best by ``first`` (B, N), then by ``offset - slope * state``.

    The state (B, N) is the largest cosine to a pick, or with ``add`` the sum of them. ``parallel`` picks of a step do
    not see each other. Where there are too many tokens for a table, each step computes its own columns.
    """
    cosines = cosines.whole()
    picked = k.new_full((len(k), int(k.max())), -1)
    closed = torch.zeros_like(first).masked_fill_(~valid, float("-inf"))
    state, scores = None, first
    with one_thread(k.device, cosines.read):
        for step in range(0, picked.shape[1], parallel):
            best = best_of(scores + closed, min(parallel, picked.shape[1] - step))
            picked[:, step : step + parallel] = best
            closed.scatter_(1, best, float("-inf"))
            state = joined(state, cosines.columns(best), add)
            if cosines.table is not None and parallel == 1 and triton_greedy.available(k.device):
                most = picked.shape[1] - 1
                picked[:, 1:] = triton_greedy.serve(cosines.table, offset, slope, state, closed == 0, most, add)
                break
            scores = offset - slope * state
    return first_picks(picked, k)


def joined(state: Tensor | None, columns: Tensor, add: bool = False) -> Tensor:
    """(B, N): a state after picks with these columns (B, P, N); None stands for that before the first."""
    new = columns.sum(1) if add else columns.amax(1)
    if state is None:
        return new
    return state + new if add else torch.maximum(state, new)


def best_of(scores: Tensor, width: int) -> Tensor:
    """(B, width) long: the tokens with the largest ``scores`` (B, N), the lowest first on ties."""
    if width == 1:
        return scores.argmax(1, keepdim=True)
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :width]


def only(start: Tensor, like: Tensor) -> Tensor:
    """(B, N) scores that put ``start`` (B,) first."""
    return torch.zeros_like(like, dtype=torch.float32).scatter_(1, start[:, None], 1.0)
