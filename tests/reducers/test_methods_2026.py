# SPDX-License-Identifier: Apache-2.0
"""What makes each newer method the method it is; vectors of the authors are in tests/ops/test_golden.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import vtoken
from vtoken.reducers import mmtok

from .contexts import Row, make_context, random

GRID, SMALL = (Row((kind,), 5) for kind in ("grid", "small"))
SIZES = (23, 1, 17)


def kept(reducer, ctx) -> list[int]:
    return reducer.before_llm(ctx).keep[0].nonzero()[:, 0].tolist()


def ragged(seed: int, width: int = 12) -> tuple[Tensor, Tensor]:
    """Tokens (3, 23, width), rows of unequal length whose padding is not finite, and which are valid."""
    valid = torch.arange(max(SIZES)) < torch.tensor(SIZES)[:, None]
    return random(seed, 3, max(SIZES), width).masked_fill(~valid[..., None], float("nan")), valid


# ---------------------------------------------------------------------------------------------------------- mmtok
def naive_cover(x: Tensor, tower: Tensor, text: Tensor, k: int) -> list[int]:
    unit = nn.functional.normalize
    words = (unit(text, dim=1) @ unit(x, dim=1).T / 0.02).softmax(1) / len(text)
    picture = (unit(tower, dim=1) @ unit(tower, dim=1).T / 0.2).softmax(1) / len(x)
    matrix = torch.cat([words, 0.5 * picture])
    best, picks = torch.zeros(len(matrix), dtype=x.dtype), []
    for _ in range(min(k, len(x))):
        gain = (matrix - best[:, None]).clamp(min=0).sum(0)
        gain[picks] = -1
        picks.append(int(gain.argmax()))
        best = torch.maximum(best, matrix[:, picks[-1]])
    return picks


@pytest.mark.parametrize("dense", [mmtok.DENSE, 0])
def test_mmtok_is_the_plain_greedy_on_ragged_rows_with_and_without_a_square_table(monkeypatch, dense):
    monkeypatch.setattr(mmtok, "DENSE", dense)
    (x, valid), (tower, _) = ragged(1), ragged(2, 9)
    text = random(3, 3, 6, 12)
    real = torch.arange(6) >= torch.tensor([[0], [2], [5]])
    found = mmtok.cover_both(x, tower, text, torch.tensor([9, 4, 17]), valid, real)
    for row, (size, k) in enumerate(zip(SIZES, (9, 4, 17), strict=True)):
        mine = (part[row].double() for part in (x[:, :size], tower[:, :size], text))
        one, two, three = mine
        expected = naive_cover(one, two, three[real[row]], k)
        assert found[row].tolist() == expected + [-1] * (17 - len(expected))


def test_mmtok_takes_the_token_of_a_word():
    ctx = make_context(GRID)
    words = ctx.hidden[0, ctx.text[0]][-1]
    ctx.hidden[0, ctx.visual[0].nonzero()[7, 0]] = 3 * words
    assert 7 in kept(vtoken.MMTok(keep=4, alpha=0.0), ctx)


def test_mmtok_reads_what_it_is_told_to():
    ctx = make_context(GRID)
    other = replace(ctx, projector_input=None)
    assert vtoken.MMTok().needs_projector
    assert not vtoken.MMTok(visual="projected").needs_projector
    assert len(kept(vtoken.MMTok(keep=5, visual="projected"), other)) == 5
    with pytest.raises(ValueError, match="give visual='projected'"):
        vtoken.MMTok(keep=5).before_llm(other)
