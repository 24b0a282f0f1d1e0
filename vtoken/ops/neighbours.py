# SPDX-License-Identifier: Apache-2.0
"""Nearest rows of another set, and means over them."""

from __future__ import annotations

import torch
from torch import Tensor

from vtoken.precision import selection

ROWS = 1024
"""Rows whose distances exist at a time."""


@selection
def nearest_rows(rows: Tensor, others: Tensor, k: int) -> Tensor:
    """(R, min(k, K)) long: for each of ``rows`` (R, C) the nearest of ``others`` (K, C), Euclidean, nearest first."""
    k = min(k, len(others))
    others = others.float()
    parts = [torch.cdist(part, others).topk(k, largest=False).indices for part in rows.float().split(ROWS)]
    return torch.cat(parts) if parts else rows.new_zeros(0, k, dtype=torch.long)


def neighbour_mean(values: Tensor, neighbours: Tensor) -> Tensor:
    """(R, ...) mean of ``values`` (K, ...) over the rows that ``neighbours`` (R, k) names; (R, k, ...) never exists."""
    total = values[neighbours[:, 0]]
    for column in neighbours[:, 1:].unbind(1):
        total = total + values[column]
    return total / neighbours.shape[1]
