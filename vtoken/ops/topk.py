# SPDX-License-Identifier: Apache-2.0
"""The k best scores, ties to the lowest index."""

from __future__ import annotations

from torch import Tensor

from vtoken.ops.common import counts, finite, first_picks, mask_of


def top_k(scores: Tensor, k: int | Tensor, valid: Tensor | None = None) -> Tensor:
    """Indices of the highest scores of each row.

    Parameters
    ----------
    scores : Tensor
        (B, N).
    k : int or Tensor
        How many, or (B,) long; more than there are valid tokens means all of them.
    valid : Tensor, optional
        (B, N) bool: tokens to choose from.

    Returns
    -------
    Tensor
        (B, max k) long, highest first, padded with -1.

    Raises
    ------
    ValueError
        If the score of a valid token is not finite, or ``k`` is negative.
    """
    valid = mask_of(scores, valid)
    count = counts(k, valid)
    return best_k(finite(scores, valid, "scores"), count, valid)


def best_k(scores: Tensor, count: Tensor, valid: Tensor) -> Tensor:
    """`top_k` of finite scores and counts (B,) that the valid tokens suffice for, without looking at either."""
    ranked = scores.masked_fill(~valid, float("-inf"))
    order = ranked.sort(dim=1, descending=True, stable=True).indices[:, : int(count.max())]
    return first_picks(order, count)
