# SPDX-License-Identifier: Apache-2.0
"""A pick loop in one Triton kernel: no launch per pick. Optional: `available` says if."""

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


def serve(table: Tensor, offset: Tensor, slope: Tensor, state: Tensor, free: Tensor, most: int, add: bool) -> Tensor:
    """Pick the largest ``offset - slope * state`` again and again, the lowest token on ties.

    Parameters
    ----------
    table : Tensor
        (B, N, N) similarities.
    offset, slope, state : Tensor
        (B, N) float32; the state is the largest similarity to a pick, or their sum with ``add``.
    free : Tensor
        (B, N) bool.
    most : int
        Picks.

    Returns
    -------
    Tensor
        (B, most) long; of a row with fewer free tokens, the last ones mean nothing.
    """
    size, width = state.shape
    picks = torch.zeros(size, most, dtype=torch.long, device=state.device)
    scores = (values.contiguous() for values in (offset, slope, state))
    block = triton.next_power_of_2(width)
    _kernel[(size,)](
        table.contiguous(), *scores, free.to(torch.int8), picks, width, most, add=add, block=block, num_warps=WARPS
    )
    return picks


def _serve_row(table, offset, slope, state, free, picks, width, most, add: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < width
    begin = row * width
    base = tl.load(offset + begin + at, mask=inside, other=0.0)
    rate = tl.load(slope + begin + at, mask=inside, other=0.0)
    now = tl.load(state + begin + at, mask=inside, other=0.0)
    open_ = (tl.load(free + begin + at, mask=inside, other=0) != 0) & inside
    for step in range(most):
        scores = tl.where(open_, base - rate * now, float("-inf"))
        value = tl.max(scores, axis=0)
        best = tl.min(tl.where((scores == value) & inside, at, block), axis=0)
        tl.store(picks + row * most + step, best)
        column = tl.load(table + (begin + best) * width + at, mask=inside, other=0.0)
        now = now + column if add else tl.maximum(now, column)
        open_ = open_ & (at != best)


_kernel: Any = triton.jit(_serve_row) if triton is not None else None
