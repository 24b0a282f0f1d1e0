# SPDX-License-Identifier: Apache-2.0
"""The pick loop of a pool in one Triton kernel: no launch and no host sync per pick. Optional: `available` says if."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton comes with CUDA builds of torch
    triton = tl = None

WARPS = 8


def available(device: torch.device) -> bool:
    """Whether the kernel can run on a device."""
    return triton is not None and device.type == "cuda"


def serve(
    table: Tensor,
    offset: Tensor,
    slope: Tensor,
    state: Tensor,
    free: Tensor,
    index: Tensor,
    rival_score: Tensor,
    rival_token: Tensor,
    left: Tensor,
    most: int,
    add: bool,
) -> tuple[Tensor, Tensor]:
    """Pick the largest ``offset - slope * state`` again and again, until it falls behind the rival.

    Parameters
    ----------
    table : Tensor
        (B, P, P) similarities.
    offset, slope, state : Tensor
        (B, P) float32; the state is the largest similarity to a pick, or their sum with ``add``.
    free : Tensor
        (B, P) bool.
    index, rival_score, rival_token : Tensor
        (B, P) long token numbers, and score and number of the best token outside, (B, 1) each: ties go to the lowest.
    left : Tensor
        (B,) long: picks that a row still wants; it never falls behind after them.
    most : int
        Picks at most.

    Returns
    -------
    picks : Tensor
        (B, most) long places in the pool.
    served : Tensor
        (B,) long: how many of them hold.
    """
    size, width = state.shape
    picks = torch.zeros(size, most, dtype=torch.long, device=state.device)
    served = torch.full((size,), most, dtype=torch.long, device=state.device)
    _kernel[(size,)](
        table.contiguous(),
        offset.contiguous(),
        slope.contiguous(),
        state.contiguous(),
        free.to(torch.int8),
        index.contiguous(),
        rival_score.contiguous(),
        rival_token.contiguous(),
        left.contiguous(),
        picks,
        served,
        width,
        most,
        add=add,
        block=triton.next_power_of_2(width),
        num_warps=WARPS,
    )
    return picks, served


def _serve_row(
    table, offset, slope, state, free, index, rival_score, rival_token, left, picks, served, width, most,
    add: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < width
    begin = row * width
    base = tl.load(offset + begin + at, mask=inside, other=0.0)
    rate = tl.load(slope + begin + at, mask=inside, other=0.0)
    now = tl.load(state + begin + at, mask=inside, other=0.0)
    open_ = (tl.load(free + begin + at, mask=inside, other=0) != 0) & inside
    limit = tl.load(rival_score + row)
    limit_token = tl.load(rival_token + row)
    wanted = tl.load(left + row)
    step = 0
    running = wanted == wanted  # a tensor from the start, as later
    while running:
        scores = tl.where(open_, base - rate * now, float("-inf"))
        value = tl.max(scores, axis=0)
        best = tl.min(tl.where((scores == value) & inside, at, block), axis=0)
        token = tl.load(index + begin + best)
        behind = (value < limit) | ((value == limit) & (token > limit_token))
        stop = behind & (step < wanted) & (step > 0)
        if stop:
            tl.store(served + row, step)
        else:
            tl.store(picks + row * most + step, best)
            column = tl.load(table + (begin + best) * width + at, mask=inside, other=0.0)
            now = now + column if add else tl.maximum(now, column)
            open_ = open_ & (at != best)
        step += 1
        running = (step < most) & (stop == 0)


_kernel: Any = triton.jit(_serve_row) if triton is not None else None
