# SPDX-License-Identifier: Apache-2.0
"""Ragged row surgery on batches: pure tensor functions; what they know of models is left padding.

Shapes: B rows, S tokens before a cut, n tokens after it (the longest row), D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compact(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Right-align the kept tokens of each row.

    Parameters
    ----------
    keep : Tensor
        (B, S) bool.

    Returns
    -------
    index : Tensor
        (B, n) long: the kept positions of each row, in order, behind zeros; n is the largest count.
    valid : Tensor
        (B, n) bool: False on the padding.
    """
    count = keep.sum(1)
    n = int(count.max())
    order = keep.to(torch.int8).sort(dim=1, stable=True).indices  # dropped first, kept last, both in order
    index = order[:, keep.shape[1] - n :]
    valid = torch.arange(n, device=keep.device)[None] >= (n - count)[:, None]
    return torch.where(valid, index, 0), valid


def run_lengths(here: Tensor) -> list[int]:
    """Lengths of the unbroken runs of True in the rows of ``here`` (B, S), row by row.

    >>> run_lengths(torch.tensor([[True, True, False, True]]))
    [2, 1]
    """
    edges = torch.nn.functional.pad(here, (1, 1)).int().diff(dim=1)
    starts, ends = (edges == 1).nonzero()[:, 1], (edges == -1).nonzero()[:, 1]
    return (ends - starts).tolist()


def gather(x: Tensor, index: Tensor, dim: int = 1, batch: int = 0) -> Tensor:
    """Take ``index[b]`` along ``dim`` for each row ``b`` of the ``batch`` dimension (size 1 broadcasts)."""
    if x.shape[batch] != index.shape[0]:
        x = x.expand(*[index.shape[0] if d == batch else s for d, s in enumerate(x.shape)])
    index = index.to(x.device)
    if (batch, dim) == (0, 1) and x.dim() == 2:
        return x.gather(1, index)
    if (batch, dim) == (0, 1):  # copies whole rows, where `Tensor.gather` looks up every channel
        starts = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
        rows = x.flatten(0, 1).index_select(0, (index + starts).flatten())
        return rows.view(*index.shape, *x.shape[2:])
    shape = [1] * x.dim()
    shape[batch], shape[dim] = index.shape
    size = list(x.shape)
    size[dim] = index.shape[1]
    return x.gather(dim, index.view(shape).expand(size))


def restore(hidden: Tensor, keep: Tensor) -> Tensor:
    """Bring compacted states back to full length.

    A dropped position gets the state of the nearest kept one before it, so that next-token logits and a shifted
    loss are those of the shortened sequence.

    Parameters
    ----------
    hidden : Tensor
        (B, n, D), right aligned.
    keep : Tensor
        (B, S) bool, the mask that `compact` was given.

    Returns
    -------
    Tensor
        (B, S, D).
    """
    n = hidden.shape[1]
    count = keep.sum(1, keepdim=True)
    rank = (keep.cumsum(1) - 1).clamp(min=0) + (n - count)
    return gather(hidden, rank.clamp(max=n - 1).to(hidden.device))


def spread(x: Tensor, item: Tensor, slot: Tensor, fill: float = 0.0) -> Tensor:
    """Bring an item-wise tensor to the places of its tokens in a sequence.

    Parameters
    ----------
    x : Tensor
        (I, N, ...).
    item, slot : Tensor
        (B, S) long: which token stands at each place, -1 where there is none.

    Returns
    -------
    Tensor
        (B, S, ...), ``fill`` where there is no token.
    """
    here = item >= 0
    found = x[item.clamp(min=0), slot.clamp(min=0)]
    if x.dtype == torch.bool and not fill:
        return found & here
    return torch.where(here.view(*here.shape, *[1] * (x.dim() - 2)), found, fill)
