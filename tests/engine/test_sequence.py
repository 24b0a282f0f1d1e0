# SPDX-License-Identifier: Apache-2.0
"""Row surgery against plain loops."""

from __future__ import annotations

import pytest
import torch

from vtoken.ops.ragged import compact, gather, restore


def ragged(rows=3, tokens=11):
    return torch.rand(rows, tokens, generator=torch.Generator().manual_seed(0)) < 0.6


@pytest.mark.parametrize("shape", [(3, 11), (3, 11, 4), (3, 11, 2, 4), (1, 11, 4)])
def test_gather_takes_rows_of_each_row(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    index, _ = compact(ragged())
    found = gather(x, index)
    wide = x.expand(3, *shape[1:])
    for row, places in enumerate(index.tolist()):
        for column, place in enumerate(places):
            assert torch.equal(found[row, column], wide[row, place])


def test_gather_passes_gradients_on():
    x = torch.randn(3, 11, 4, requires_grad=True)
    index, _ = compact(ragged())
    gather(x, index).sum().backward()
    wanted = torch.stack([torch.bincount(places, minlength=11) for places in index])
    assert torch.equal(x.grad, wanted[..., None].expand(-1, -1, 4).float())


def test_restore_repeats_the_nearest_kept_state_before():
    keep = ragged()
    keep[:, 0] = True
    x = torch.randn(3, 11, 4, generator=torch.Generator().manual_seed(2))
    index, _ = compact(keep)
    found = restore(gather(x, index), keep)
    for row in range(3):
        for place in range(11):
            last = max(p for p in range(place + 1) if keep[row, p])
            assert torch.equal(found[row, place], x[row, last])
