# SPDX-License-Identifier: Apache-2.0
"""Max-min selection, and the token farthest from its nearest neighbour, with which it starts."""

from __future__ import annotations

import torch
from torch import Tensor

from vtoken.ops.common import counts, mask_of
from vtoken.ops.cosines import CHUNK, Cosines
from vtoken.ops.lazy import on_host
from vtoken.ops.nearest import only, pick
from vtoken.ops.nested import row_by_row

PART = 256  # tokens that those in the race for the most isolated one meet at a time
FINAL = 16  # of them, whose nearest neighbours are found at once
ROUNDING = 1e-5  # by which cosines from products of other shapes may differ


def max_min(features: Tensor, k: int | Tensor, valid: Tensor | None = None) -> Tensor:
    """Max-min selection that starts at the token farthest from its nearest neighbour (DivPrune, arXiv 2503.02175).

    Picked tokens leave the choice, so identical tokens give no duplicates. Parameters, result and errors are those of
    `k_center`.
    """
    valid = mask_of(features, valid)
    cosines = Cosines(features, valid)
    if on_host(valid.device):
        return row_by_row(_from_most_isolated, cosines, counts(k, valid), valid)
    return pick(cosines, counts(k, valid), valid, -nearest_similarity(cosines, valid))


def _from_most_isolated(cosines: Cosines, k: Tensor, valid: Tensor) -> Tensor:
    """(1, k) picks of one row without invalid tokens."""
    return pick(cosines, k, valid, only(torch.tensor([most_isolated(cosines)]), valid))


def nearest_similarity(cosines: Cosines, valid: Tensor) -> Tensor:
    """(B, N): cosine of each token and its nearest other valid token; -1 if it is alone."""
    tokens = torch.arange(cosines.shape[1], device=valid.device)
    parts = []
    for rows in tokens.split(CHUNK):
        near = cosines.columns(rows.expand(len(valid), -1))
        near.masked_fill_(~valid[:, None, :] | (rows[:, None] == tokens), -1.0)
        parts.append(near.amax(2))
    return torch.cat(parts, 1)


def most_isolated(cosines: Cosines) -> int:
    """The token of one row with the smallest `nearest_similarity`, without computing it for all of a long one.

    Tokens meet the others part by part and leave once they met one that they are nearer to than the best is to any.
    """
    if cosines.table is not None:
        return int(cosines.table[0].clone().fill_diagonal_(-1.0).amax(1).argmin())
    tokens = cosines.shape[1]
    racing, rows = torch.arange(tokens), cosines
    found, limit = torch.full((tokens,), -1.0), float("inf")
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))  # neighbours are alike: they tell little
    for turn, others in enumerate(order.split(PART)):
        if len(racing) <= FINAL:
            break
        near = rows.facing(cosines.part(0, others)).masked_fill_(racing[:, None] == others, -1.0)
        found = torch.maximum(found, near.amax(1))
        if turn == 0:  # the first part met everyone
            limit = float(near.amax(0).amin()) + ROUNDING
        elif turn == 1:
            few = racing[found.topk(min(FINAL, len(racing)), largest=False).indices]
            limit = min(limit, float(_nearest(cosines, few).amin()) + ROUNDING)
        ahead = (found <= limit).nonzero()[:, 0]
        if 2 * len(ahead) <= len(racing):  # copying the rows of fewer tokens costs more than it saves
            racing, rows, found = racing[ahead], rows.part(0, ahead), found[ahead]
    if len(racing) <= FINAL:
        found = _nearest(cosines, racing)
    return int(racing[found.argmin()])


def _nearest(cosines: Cosines, few: Tensor) -> Tensor:
    """(F,): the largest similarity of the tokens ``few`` (F,) to any other token."""
    near = cosines.columns(few[None])[0]
    return near.scatter(1, few[:, None], -1.0).amax(1)
