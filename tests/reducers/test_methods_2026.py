# SPDX-License-Identifier: Apache-2.0
"""What makes each newer method the method it is; vectors of the authors are in tests/ops/test_golden.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import vtoken
from vtoken.ops import cosines
from vtoken.reducers import apet, mmtok, prunesid
from vtoken.reducers.v2drop import BEFORE

from .contexts import Row, make_context, random, run

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


@pytest.mark.parametrize("dense", [cosines.DENSE, 0])
def test_mmtok_is_the_plain_greedy_on_ragged_rows_with_and_without_a_square_table(monkeypatch, dense):
    monkeypatch.setattr(cosines, "DENSE", dense)
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


# --------------------------------------------------------------------------------------------------------- v2drop
def through_layers(reducer, ctx, states) -> list[list[int]]:
    """Tokens of the first image after each cut, where the states (N, D) of its layers are given."""
    found = []
    for layer in reducer.layers(ctx.depth):
        hidden = ctx.hidden.clone()
        hidden[ctx.visual] = states[layer][ctx.slot[ctx.visual]]
        ctx = replace(ctx, layer=layer, hidden=hidden)
        cut = reducer.at_layer(layer, ctx)
        ctx = ctx.after(cut)
        found.append(cut.keep[0].nonzero()[:, 0].tolist())
    return found


def test_v2drop_compares_neighbouring_layers_of_what_is_left():
    ctx = make_context(GRID)
    states = {layer: random(layer, 36, ctx.hidden.shape[2]) for layer in range(ctx.depth)}
    reducer = vtoken.V2Drop(keep=9, at=(2, 3), last=6)
    assert reducer.layers(ctx.depth) == (1, 2, 3, 5, 6)
    moved = {layer: (states[layer] - states[layer - 1]).norm(dim=1) for layer in (2, 3, 6)}
    first = sorted(moved[2].topk(18).indices.tolist())
    second = sorted(first[i] for i in moved[3][first].topk(9).indices)
    third = [second[int(moved[6][second].argmax())]]
    assert through_layers(reducer, ctx, states) == [list(range(36)), first, second, second, third]


def test_v2drop_forgets_states_that_no_layer_asks_for():
    ctx = make_context(GRID)
    cuts = [vtoken.V2Drop(keep=9, at=(2, 4)).at_layer(layer, replace(ctx, layer=layer)) for layer in (1, 3)]
    assert all(cut.notes[BEFORE].shape == ctx.features.shape for cut in cuts)
    after = ctx.after(cuts[0])
    assert vtoken.V2Drop(keep=9, at=(2, 4)).at_layer(2, replace(after, layer=2)).notes[BEFORE] is None


def test_v2drop_ends_after_its_cuts():
    reducer = vtoken.V2Drop(at=(3, 17), last=0.5)
    with pytest.raises(ValueError, match=r"last=0.5 is layer 16 of 32, not after layer 17"):
        reducer.layers(32)
    assert vtoken.get_reducer("v2drop-32").layers(32) == (2, 3, 16, 17, 21, 22)


# ------------------------------------------------------------------------------------- controls inside the decoder
@pytest.mark.parametrize("name", ["random", "uniform"])
def test_a_control_chooses_at_a_layer_what_it_chooses_before_the_decoder(name):
    ctx = make_context(SMALL, GRID)
    before, inside = (vtoken.get_reducer(name, keep=0.25, layer=layer) for layer in (None, 5))
    assert (before.stages, before.layers(8)) == (("before_llm",), ())
    assert (inside.stages, inside.layers(8)) == (("in_llm",), (5,))
    assert inside.before_llm(ctx) is None
    assert torch.equal(inside.at_layer(5, replace(ctx, layer=5)).keep, before.before_llm(ctx).keep)


def test_random_follows_diversity_in_a_chain():
    chain = vtoken.Chain([vtoken.DivPrune(keep=0.5), vtoken.Random(keep=0.25, layer=0.5)])
    steps = run(chain, make_context(GRID))
    assert [int(ctx.valid.sum()) for ctx in steps] == [36, 18, 9]
    with pytest.raises(ValueError, match="acts before the language model"):
        vtoken.Chain([vtoken.Random(keep=0.5, layer=0.5), vtoken.DivPrune(keep=0.25)])


# -------------------------------------------------------------------------------------------------------- otprune
def test_otprune_covers_what_differs_and_lets_no_channel_rule():
    ctx = make_context(GRID)
    ctx.hidden[ctx.visual] = random(1, 6, 16).repeat_interleave(6, 0) + 0.01 * random(0, 36, 16)
    reducer = vtoken.OTPrune(keep=6, gamma=1e4)  # so few channels leave the authors' 0.01 next to nothing
    chosen = kept(reducer, ctx)
    assert {token // 6 for token in chosen} == set(range(6))
    ctx.hidden[..., 3] *= 64
    assert kept(reducer, ctx) == chosen


# ----------------------------------------------------------------------------------------------------------- apet
def naive_plan(x: Tensor, quota: int, start: int, basis: int) -> tuple[list[int], list[int]]:
    """Basis tokens, and the slot that each token goes into."""
    count = min(basis, quota - 1)
    chosen = [start][:count]
    while len(chosen) < count:
        gap = torch.cdist(x, x[chosen]).amin(1)
        chosen.append(int(gap.argmax()))
    rows = x[chosen]
    weights = torch.linalg.solve(rows @ rows.T + 1e-5 * torch.eye(count, dtype=x.dtype), rows @ x.T)
    error = (x - weights.T @ rows).norm(dim=1)
    targets = [i for i in error.argsort(descending=True).tolist() if i not in chosen][: quota - count]
    unit = nn.functional.normalize(x, dim=1)
    nearest = [targets[int((unit[targets] @ unit[i]).argmax())] for i in range(len(x))]
    return chosen, [i if i in (*chosen, *targets) else nearest[i] for i in range(len(x))]


def test_apet_keeps_the_basis_in_its_place_on_ragged_rows():
    (x, valid), quota, start = ragged(4), torch.tensor([12, 1, 4]), torch.tensor([5, 0, 9])
    found = apet.plan(x, quota, start, valid, 6)
    for row, size in enumerate(SIZES):
        chosen, source = naive_plan(x[row, :size].double(), int(quota[row]), int(start[row]), 6)
        assert found.basis[row].tolist() == chosen + [-1] * (6 - len(chosen))
        assert found.source[row].tolist() == source + [-1] * (max(SIZES) - size)
    assert (found.written < 0).all()


def test_apet_writes_the_basis_elsewhere_as_its_authors_do():
    ctx = make_context(GRID)
    plain, compat = (vtoken.ApET(keep=12, basis=4, compat=compat).before_llm(ctx) for compat in (False, True))
    basis = [token for token in plain.keep[0].nonzero()[:, 0].tolist() if plain.sizes[0, token] == 1]
    inside = {tuple(row) for row in compat.features[0][compat.keep[0]].tolist()}
    again = [token for token in basis if tuple(ctx.features[0, token].tolist()) in inside]
    assert len(again) >= 4
    assert sum(bool(compat.keep[0, token]) for token in again) < 4
    assert int(compat.keep.sum()) == int(plain.keep.sum()) == 12


def test_apet_starts_elsewhere_with_another_seed():
    ctx = make_context(GRID)
    assert len({tuple(kept(vtoken.ApET(keep=9, seed=seed), ctx)) for seed in range(5)}) > 1


# ------------------------------------------------------------------------------------------------------- prunesid
@pytest.mark.parametrize("shape", [(12, 30), (40, 9)])
def test_prunesid_groups_by_the_exact_components(shape):
    x = random(1, *shape)
    samples = x.double().sigmoid().T
    components = torch.linalg.svd(samples - samples.mean(0)).Vh[:4]
    assert torch.equal(prunesid.components(x, 4), components.abs().argmax(0))


def test_prunesid_suppresses_in_the_order_of_scores_inside_of_groups():
    unit = nn.functional.normalize(random(2, 30, 5), dim=1)
    scores, group = random(3, 30), torch.arange(30) % 3
    found = prunesid.survivors(unit, scores, group, 4, 0.3)
    stay: list[int] = []
    for token in scores.argsort(descending=True).tolist():
        if all(float(unit[token] @ unit[other]) <= 0.3 for other in stay if group[other] == group[token]):
            stay.append(token)
    assert found.nonzero()[:, 0].tolist() == sorted(stay)
    assert 3 < len(stay) < 30


@pytest.mark.parametrize(
    ("sizes", "survived", "count", "expected"),
    [
        ([4, 4, 4], [4, 4, 4], 9, [3, 3, 3]),
        ([10, 1, 0], [9, 1, 0], 8, [7, 1, 0]),  # caps rise, the empty group stays empty
        ([9, 9], [1, 1], 10, [5, 5]),  # suppressed tokens return
    ],
)
def test_prunesid_shares_the_budget_by_survivors(sizes, survived, count, expected):
    assert prunesid.shared(sizes, survived, count, count) == expected


def test_prunesid_keeps_one_of_twins():
    ctx = make_context(GRID)
    tower = random(1, 12, 8).repeat_interleave(3, 0)[None]
    chosen = kept(vtoken.PruneSID(keep=12), replace(ctx, projector_input=tower))
    assert len({token // 3 for token in chosen}) > len({token // 3 for token in kept(vtoken.FoPru(keep=12), ctx)})
