# SPDX-License-Identifier: Apache-2.0
"""Max-sum diversification. Sums of similarities rise and fall, so that no old score bounds a new one.

On the host, picks are drafted among the best tokens, then all tokens are compared with many drafted picks at once. A
draft holds as far as no other token has a smaller sum.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vtoken.ops.common import counts, mask_of
from vtoken.ops.cosines import Cosines
from vtoken.ops.greedy import start_of
from vtoken.ops.lazy import on_host
from vtoken.ops.nearest import only, pick
from vtoken.ops.nested import row_by_row

POOL = 192  # tokens among which picks are drafted
DRAFT = 32  # picks drafted at a time; a product of so many columns costs little more than one of a few
COLUMNS = 4  # columns a pick that are held


def max_sum(features: Tensor, k: int | Tensor, start: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """Max-sum diversification: the smallest sum of cosines to the picks (ToDRE v2, arXiv 2505.18757, Eq. 4-6).

    Parameters, result and errors are those of `k_center`.
    """
    valid = mask_of(features, valid)
    first = only(start_of(start, valid), valid)
    count, cosines = counts(k, valid), Cosines(features, valid)
    if not on_host(valid.device):  # a look at every draft would be a host sync
        return pick(cosines, count, valid, first, add=True)
    return row_by_row(_drafted, cosines, count, valid, first)


def _drafted(cosines: Cosines, k: Tensor, valid: Tensor, first: Tensor) -> Tensor:
    """(1, k) picks of one row without invalid tokens."""
    if cosines.table is not None:
        return pick(cosines, k, valid, first, add=True)
    picks = torch.full((1, int(k)), -1)
    total, closed = torch.zeros(valid.shape[1]), torch.zeros(valid.shape[1])
    columns: dict[int, Tensor] = {}
    best = int(first.argmax())
    for step in range(picks.shape[1]):
        picks[0, step], closed[best] = best, float("inf")
        if best not in columns:
            if len(columns) > COLUMNS * picks.shape[1]:
                columns.clear()
            draft = _draft(cosines, columns, total + closed, best, min(DRAFT, picks.shape[1] - step))
            index = torch.tensor([[token for token in draft if token not in columns]])
            columns.update(zip(index[0].tolist(), cosines.columns(index)[0].contiguous(), strict=True))
        total = total + columns[best]
        best = int((total + closed).argmin())
    return picks


def _draft(cosines: Cosines, columns: dict[int, Tensor], sums: Tensor, first: int, most: int) -> list[int]:
    """``first`` and the picks after it, if none but the tokens with the smallest ``sums`` (N,) were to be picked."""
    index = sums.index_fill(0, torch.tensor(first), float("-inf")).topk(min(POOL, len(sums)), largest=False).indices
    table, total = _among(cosines, columns, index), sums[index].numpy()  # small steps cost less in numpy
    draft = [0]
    while len(draft) < most:
        total = total + table[draft[-1]]
        total[draft[-1]] = float("inf")
        draft.append(int(total.argmin()))
    return index[draft].tolist()


def _among(cosines: Cosines, columns: dict[int, Tensor], index: Tensor) -> np.ndarray:
    """(P, P) cosines of the tokens ``index`` (P,), some of which are among the known ``columns``."""
    tokens = index.tolist()
    known = [place for place, token in enumerate(tokens) if token in columns]
    others = [place for place, token in enumerate(tokens) if token not in columns]
    table = np.empty((len(tokens), len(tokens)), dtype=np.float32)
    if known:
        table[known] = torch.stack([columns[tokens[place]] for place in known])[:, index].numpy()
        table[np.ix_(others, known)] = table[np.ix_(known, others)].T
    table[np.ix_(others, others)] = cosines.among(index[None, others])[0].numpy()
    return table
