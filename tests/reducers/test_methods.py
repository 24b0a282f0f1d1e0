# SPDX-License-Identifier: Apache-2.0
"""What makes each method the method it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import vtoken
from vtoken.encoder import EncoderRead
from vtoken.reducers import vispruner
from vtoken.reducers.base import stage_budget
from vtoken.reducers.checks import layer_at
from vtoken.reducers.gate import load_gates
from vtoken.reducers.hiprune import grid_neighbours, raster_neighbours
from vtoken.reducers.holov import segment_budget
from vtoken.reducers.rows import text_to_visual
from vtoken.reducers.sparsevlm import relevant
from vtoken.reducers.todre import exit_layer
from vtoken.reducers.tokencorr import density
from vtoken.reducers.views import Views
from vtoken.reducers.vtw import calibrated_layer
from vtoken.reducers.zooprune import in_float32, sensitivity

from .contexts import DEPTH, RAGGED, WIDTH, Row, attend, make_context, random, run

GRID, SMALL, ANYRES, VIDEO = (Row((kind,), 5) for kind in ("grid", "small", "anyres", "video"))


def kept(reducer, ctx) -> list[int]:
    return reducer.before_llm(ctx).keep[0].nonzero()[:, 0].tolist()


# -------------------------------------------------------------------------------------------------------- controls
def test_random_takes_other_tokens_with_another_seed_and_the_same_ones_in_any_batch():
    ctx = make_context(GRID)
    choices = {tuple(kept(vtoken.Random(keep=9, seed=seed), ctx)) for seed in range(5)}
    assert len(choices) == 5
    both = vtoken.Random(keep=9).before_llm(make_context(SMALL, GRID)).keep[1]
    assert both.nonzero()[:, 0].tolist() == kept(vtoken.Random(keep=9), ctx)


@pytest.mark.parametrize("keep", [1, 2, 3, 5, 7, 17, 36])
def test_uniform_is_evenly_spaced_and_centred(keep):
    index = torch.tensor([-1, *kept(vtoken.Uniform(keep=keep), make_context(GRID)), 36])
    gaps = index.diff()
    assert gaps[1:-1].max() - gaps[1:-1].min() <= 1 if keep > 1 else True
    assert abs(int(gaps[0]) - int(gaps[-1])) <= 2


@pytest.mark.parametrize(("keep", "cells"), [(9, 3), (4, 2), (1, 1), (36, 6)])
def test_pooled_is_average_pooling_where_the_grid_divides(keep, cells):
    ctx = make_context(GRID)
    cut = vtoken.Pooled(keep=keep).before_llm(ctx)
    pooled = nn.functional.adaptive_avg_pool2d(ctx.features[0].T.view(WIDTH, 6, 6), cells)
    torch.testing.assert_close(cut.features[0][cut.keep[0]], pooled.flatten(1).T)
    assert cut.sizes[0][cut.keep[0]].tolist() == [36 / keep] * keep


def test_pooled_averages_frames_apart():
    ctx = make_context(VIDEO)
    cut = vtoken.Pooled(keep=3).before_llm(ctx)
    frames = ctx.features[0].view(3, 12, WIDTH).mean(1)
    torch.testing.assert_close(cut.features[0][cut.keep[0]], frames)


# ------------------------------------------------------------------------------------------- before the language model
def test_fopru_row_keeps_whole_rows_of_the_grid():
    read = EncoderRead("received", -2)
    scores = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
    scores[[1, 4]] += 5
    ctx = make_context(GRID)
    ctx = replace(ctx, encoder={read: scores.view(1, 36), EncoderRead("given", -2): torch.full((1, 36), 1 / 36)})
    assert kept(vtoken.FoPru(keep=12, strategy="row"), ctx) == [*range(6, 12), *range(24, 30)]
    part = kept(vtoken.FoPru(keep=14, strategy="row"), ctx)
    third = [t for t in part if t // 6 not in (1, 4)]
    best_row = scores[[0, 2, 3, 5]].mean(1).argmax()
    row = [0, 2, 3, 5][int(best_row)]
    assert sorted(third) == sorted((scores[row].topk(2).indices + row * 6).tolist())


def test_fopru_uses_the_score_that_varies_more_in_each_view():
    ctx = make_context(VIDEO)
    flat, sharp = torch.full((1, 36), 0.1), random(0, 1, 36).softmax(1)
    received = torch.cat([sharp[:, :12], flat[:, 12:]], 1)
    given = torch.cat([flat[:, :12], sharp[:, 12:]], 1)
    ctx = replace(ctx, encoder={EncoderRead("received", -2): received, EncoderRead("given", -2): given})
    wanted = [int(part.argmax()) + 12 * i for i, part in enumerate(sharp.view(3, 12))]
    assert kept(vtoken.FoPru(keep=3), ctx) == wanted


def test_newlines_stay_with_methods_that_keep_them_and_go_with_the_others():
    layout = make_context(ANYRES).layouts[0]
    for reducer in (vtoken.FoPru(), vtoken.GlobalCom2(), vtoken.ZOOPrune(keep=0.25)):
        cut = reducer.before_llm(make_context(ANYRES, newlines="keep"))
        assert cut.keep[0][layout.newline].all()
    for reducer in (vtoken.ToDRE(), vtoken.Pooled(), vtoken.DivPrune(keep=0.25)):
        cut = reducer.before_llm(make_context(ANYRES, newlines="drop"))
        assert not cut.keep[0][layout.newline].any()


def test_todre_starts_in_the_thumbnail_where_cls_looks():
    ctx = make_context(ANYRES)
    scores = torch.rand(1, ctx.longest, generator=torch.Generator().manual_seed(1))
    scores[0, 20], scores[0, 9] = 5.0, 4.0  # token 20 is in a crop
    ctx = replace(ctx, encoder={EncoderRead("best", -1): scores})
    assert kept(vtoken.ToDRE(keep=1), ctx) == [9]


def test_todre_leaves_when_the_question_looks_away():
    ctx = make_context(*RAGGED)
    layer = exit_layer(DEPTH)
    for ours, theirs in ((1.0, 0), (0.0, None)):
        steps = run(vtoken.ToDRE(keep=0.5, tau=ours), ctx)
        left = steps[-1].valid.sum()
        assert left == theirs if theirs is not None else left == steps[1].valid.sum()
    assert vtoken.ToDRE(tau=None).layers(DEPTH) == ()
    assert vtoken.ToDRE().layers(32) == (29,)
    assert vtoken.ToDRE().taps(32) == {28: "question"}
    share = text_to_visual(attend(ctx, layer, "question"), ctx.visual)
    tau = float(share.sort().values[1:3].mean())
    after = run(vtoken.ToDRE(keep=1000, tau=tau), make_context(*RAGGED))[-1]
    gone = ~after.valid.any(1)
    assert gone.tolist() == (share < tau)[ctx.row].tolist()


def test_idpruner_follows_importance_diversity_or_a_scorer():
    ctx = make_context(GRID)
    scores = random(3, 1, 36)
    best = scores[0].topk(5).indices.sort().values.tolist()
    assert kept(vtoken.IDPruner(keep=5, lam=1.0, scorer=lambda ctx: scores), ctx) == best
    assert kept(vtoken.IDPruner(keep=5, lam=0.0, scorer=lambda ctx: scores), ctx) != best
    assert vtoken.IDPruner(scorer=lambda ctx: scores).encoder_reads() == ()


def test_zooprune_computes_in_float32_whatever_the_model():
    ctx = make_context(GRID)
    directions = random(0, 16, ctx.projector_input.shape[2])
    x = ctx.projector_input[0]
    true = sensitivity(x, ctx.projector, directions, 0.01)
    half = make_context(GRID, dtype=torch.bfloat16)
    found = sensitivity(x, in_float32(half.projector), directions, 0.01)
    naive = sensitivity(x, lambda moved: half.projector(moved.bfloat16()), directions, 0.01)
    assert (found - true).abs().max() / true.mean() < 0.02
    assert (naive.float() - true).abs().max() / true.mean() > 0.1
    assert half.projector[0].weight.dtype == torch.bfloat16


def test_zooprune_in_chunks_is_the_same(monkeypatch):
    ctx = make_context(GRID)
    directions = random(0, 16, ctx.projector_input.shape[2])
    whole = sensitivity(ctx.projector_input[0], ctx.projector, directions, 0.01)
    monkeypatch.setattr("vtoken.reducers.zooprune.CHUNK", 1)
    torch.testing.assert_close(sensitivity(ctx.projector_input[0], ctx.projector, directions, 0.01), whole)


def test_zooprune_refuses_models_that_show_no_projector_or_merge_tokens():
    ctx = make_context(GRID)
    ctx = replace(ctx, projector=None)
    with pytest.raises(ValueError, match="does not show"):
        vtoken.ZOOPrune().before_llm(ctx)
    with pytest.raises(ValueError, match="merging projector"):
        sensitivity(random(0, 8, 4), lambda x: x.unflatten(0, (-1, 2)).mean(1), random(1, 2, 4), 0.1)


def test_zooprune_gives_every_view_the_same():
    ctx = make_context(ANYRES, newlines="keep")
    cut = vtoken.ZOOPrune(keep=20).before_llm(ctx)
    view = ctx.view[0][cut.keep[0]]
    assert [int((view == v).sum()) for v in range(5)] == [4] * 5


def test_globalcom2_gives_more_to_crops_the_thumbnail_looks_at():
    ctx = make_context(ANYRES, newlines="keep")
    read = EncoderRead("cls_logits", -1)
    scores = ctx.encoder[read].clone()
    seen = (ctx.view[0] == 0) & (ctx.layouts[0].row >= 2) & (ctx.layouts[0].column >= 2)
    scores[0, seen] += 30
    ctx = replace(ctx, encoder={read: scores})
    cut = vtoken.GlobalCom2(keep=0.4).before_llm(ctx)
    view = ctx.view[0][cut.keep[0]]
    counts = [int((view == v).sum()) for v in range(1, 5)]
    assert counts[3] > max(counts[:3])


def test_globalcom2_scores_an_image_of_one_view_plainly():
    ctx = make_context(GRID)
    scores = ctx.encoder[EncoderRead("cls_logits", -1)]
    assert kept(vtoken.GlobalCom2(keep=7), ctx) == scores[0].topk(7).indices.sort().values.tolist()


def test_divprune_takes_each_of_identical_tokens_once():
    ctx = make_context(GRID)
    ctx.hidden[ctx.visual] = torch.eye(WIDTH)[:4].repeat(9, 1)
    assert len(kept(vtoken.DivPrune(keep=6), ctx)) == 6
    chosen = {t % 4 for t in kept(vtoken.DivPrune(keep=4), ctx)}
    assert chosen == {0, 1, 2, 3}


def test_visionzip_averages_and_compat_adds():
    ctx = make_context(GRID)
    ours = vtoken.VisionZip(keep=8, contextual=0.25).before_llm(ctx)
    theirs = vtoken.VisionZip(keep=8, contextual=0.25, compat=True).before_llm(ctx)
    assert torch.equal(ours.keep, theirs.keep)
    assert torch.equal(ours.source, theirs.source)
    for slot in ours.keep[0].nonzero()[:, 0].tolist():
        members = (ours.source[0] == slot).nonzero()[:, 0]
        others = members[members != slot]
        torch.testing.assert_close(ours.features[0, slot], ctx.features[0, members].mean(0))
        added = ctx.features[0, others].mean(0) if len(others) else 0
        torch.testing.assert_close(theirs.features[0, slot], ctx.features[0, slot] + added)
    assert (ours.sizes[0][ours.keep[0]] > 1).sum() <= 2


def test_prumerge_holds_the_rest_in_one_token_and_adaptive_counts_outliers():
    ctx = make_context(GRID)
    weight = torch.full((1, 36), 0.01)
    weight[0, [3, 8, 20]] = torch.tensor([0.3, 0.2, 0.4])
    keys = random(2, 1, 36, 8)
    ctx = replace(ctx, encoder={EncoderRead("best", -1): weight, EncoderRead("keys", -1): keys})
    cut = vtoken.PruMerge(keep=18, adaptive=True, neighbours=0).before_llm(ctx)
    assert cut.keep[0].nonzero()[:, 0].tolist() == [0, 3, 8, 20]  # slot 0 holds the rest
    rest = [t for t in range(36) if t not in (3, 8, 20)]
    torch.testing.assert_close(cut.features[0, 0], 0.01 * ctx.features[0, rest].sum(0))
    torch.testing.assert_close(cut.features[0, 8], ctx.features[0, 8])
    plus = vtoken.PruMerge(keep=10, plus=True).before_llm(ctx).keep[0].nonzero()[:, 0]
    assert {3, 8, 20} < set(plus.tolist())
    assert len(plus) == 10
    assert plus.diff().max() <= 9  # spread over the picture


def test_vispruner_drops_duplicates_first():
    ctx = make_context(GRID)
    places = ctx.visual[0].nonzero()[:, 0]
    ctx.hidden[0, places[10::2]] = ctx.hidden[0, places[11::2]]  # behind the ten important ones, in pairs
    ctx = replace(ctx, encoder={EncoderRead("best", -2): torch.linspace(1, 0.1, 36)[None]})
    chosen = kept(vtoken.VisPruner(keep=28, important=10 / 28), ctx)
    assert chosen[:10] == list(range(10))
    assert len({t // 2 for t in chosen[10:]}) == 13  # one of each pair at least: eight duplicates went


@pytest.mark.parametrize("neighbours", [1, 3, 16])
def test_thinning_removes_what_a_plain_loop_over_all_pairs_removes(neighbours, monkeypatch):
    """Rows of unequal length, lists with gaps, and so few neighbours that most have to look through all tokens."""
    monkeypatch.setattr(vispruner, "NEAREST", neighbours)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 150, 12, generator=generator)
    order = torch.stack([torch.randperm(150, generator=generator) for _ in range(3)])
    order[1, 60:] = -1
    order[2, ::4] = -1
    target = torch.tensor([17, 80, 5])
    found = vispruner.thin(x, order, target, torch.ones(3, 150, dtype=torch.bool))
    for row, listed, count, picks in zip(x, order, target.tolist(), found, strict=True):
        expected = thinned(row.double(), [token for token in listed.tolist() if token >= 0], count)
        assert picks[: len(expected)].tolist() == expected
        assert (picks[len(expected) :] == -1).all()


def thinned(x: torch.Tensor, order: list[int], count: int) -> list[int]:
    unit = nn.functional.normalize(x, dim=1)
    cosines = (unit @ unit.T).tolist()
    while len(order) > count:
        even, odd = order[0::2], order[1::2]
        near = {token: max(cosines[token][other] for other in odd) for token in even}
        even = sorted(even, key=lambda token: -near[token])
        order = even[min(8, len(order) - count) :] + odd
    return order


def test_cdpruner_prefers_what_resembles_the_prompt():
    ctx = make_context(GRID)
    text, _ = ctx.text_embeddings()
    ctx.hidden[0, ctx.visual[0].nonzero()[[4, 30], 0]] = nn.functional.normalize(text[0], dim=1).mean(0) * 10
    assert set(kept(vtoken.CDPruner(keep=1), ctx)) <= {4, 30}
    assert kept(vtoken.CDPruner(keep=1, relevance="none"), ctx) == [0]  # all alike to a plain process


def test_holov_hands_the_surplus_of_a_full_segment_on():
    mean, counts = torch.tensor([[0.9, 0.05, 0.05]]), torch.tensor([[3, 10, 10]])
    assert segment_budget(mean, counts, torch.tensor([9])).tolist() == [[3, 3, 3]]


def test_holov_serves_every_segment():
    ctx = make_context(GRID)
    ctx = replace(ctx, encoder={EncoderRead("best", -2): torch.linspace(1, 2, 36)[None]})
    chosen = torch.tensor(kept(vtoken.HoloV(keep=12, segments=6), ctx))
    assert (chosen // 6).unique().tolist() == [0, 1, 2, 3, 4, 5]


def test_hiprune_neighbours_stay_on_their_side_of_the_picture():
    row, column = torch.arange(12)[None] // 4, torch.arange(12)[None] % 4
    valid, anchor = torch.ones(1, 12, dtype=torch.bool), torch.tensor([[4, -1]])  # second row, first column
    assert grid_neighbours(anchor, row, column, valid)[0].nonzero()[:, 0].tolist() == [0, 4, 5, 8]
    assert raster_neighbours(anchor, valid, 4)[0].nonzero()[:, 0].tolist() == [0, 3, 4, 5, 8]


def test_scope_covers_clusters():
    ctx = make_context(GRID)
    ctx.hidden[ctx.visual] = torch.eye(WIDTH)[:6].repeat_interleave(6, 0) + 0.01 * random(0, 36, WIDTH)
    ctx = replace(ctx, encoder={EncoderRead("best", -2): torch.ones(1, 36)})
    assert {t // 6 for t in kept(vtoken.SCOPE(keep=6), ctx)} == set(range(6))


def test_tokencorr_finds_blank_views():
    keys = torch.cat([torch.ones(1, 12, 4), random(0, 1, 12, 4)])
    found = density(keys, torch.ones(2, 12, dtype=torch.bool), 0.9, 0.05)
    assert found[0] == 0
    assert found[1] > 0.5


def test_tome_weights_by_what_is_behind_a_token():
    ctx = make_context(GRID)
    cut = vtoken.ToMe(keep=5).before_llm(ctx)
    for slot in cut.keep[0].nonzero()[:, 0].tolist():
        members = cut.source[0] == slot
        torch.testing.assert_close(cut.features[0, slot], ctx.features[0, members].mean(0))


def test_aim_weights_every_round_alike():
    ctx = make_context(Row(("grid",), 5))
    cut = vtoken.AIM(keep=9).before_llm(ctx)
    total = cut.features[0][cut.keep[0]].sum()
    assert total.isfinite()
    plain = [ctx.features[0, cut.source[0] == slot].mean(0) for slot in cut.keep[0].nonzero()[:, 0].tolist()]
    assert not torch.allclose(torch.stack(plain), cut.features[0][cut.keep[0]])


# ------------------------------------------------------------------------------------------- inside the language model
def test_layers_of_the_authors():
    assert vtoken.FastV(layer=2).layers(32) == (2,)
    assert vtoken.FastV(layer=2).taps(32) == {1: "last"}
    assert vtoken.PyramidDrop().layers(32) == (8, 16, 24)
    assert vtoken.SparseVLM().layers(32) == (0, 3, 7, 16)
    assert vtoken.SparseVLM().taps(32) == {2: "question", 6: "question", 15: "question"}
    assert vtoken.VTW().layers(32) == (16,)
    assert vtoken.AIM().layers(28) == tuple(range(15, 23))
    assert vtoken.DyVTE().layers(32) == (21, 25, 29)
    assert vtoken.DyVTE(min_layer=0.75).layers(32) == (25, 29)
    assert (layer_at(0.5, 32), layer_at(3, 32)) == (16, 3)


def test_stages_shrink_by_one_factor():
    ctx = make_context(GRID)
    assert [stage_budget(ctx, 0.125, stage, 3).tolist() for stage in (1, 2, 3)] == [[18], [9], [4]]
    counts = [int(step.valid.sum()) for step in run(vtoken.PyramidDrop(keep=0.125), ctx)]
    assert counts == [36, 18, 9, 4]


def test_aim_prunes_to_nothing_in_equal_steps():
    counts = [int(c.valid.sum()) for c in run(vtoken.AIM(keep=16, first=2, last=6), make_context(GRID))]
    assert counts == [36, 16, 12, 8, 4, 0]


def test_fastv_keeps_what_the_last_token_attends_to():
    ctx = make_context(GRID)
    scores = ctx.per_item(attend(ctx, 2, "last").probabilities.mean(1)[:, 0])
    after = run(vtoken.FastV(keep=7, layer=3), ctx)[-1]
    assert after.valid[0].nonzero()[:, 0].tolist() == scores[0].topk(7).indices.sort().values.tolist()


def test_vtw_drops_everything():
    assert not run(vtoken.VTW(), make_context(*RAGGED))[-1].valid.any()
    quiet = torch.tensor([[1.0, 0.1, 0.002, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert calibrated_layer(quiet) == 7
    with pytest.raises(ValueError, match="raise the threshold"):
        calibrated_layer(torch.ones(2, 4))


def test_sparsevlm_recycles_within_the_budget():
    ctx = make_context(GRID)
    steps = run(vtoken.SparseVLM(keep=8, at=(3,)), ctx)
    plain = run(vtoken.SparseVLM(keep=8, at=(3,), recycle=False), ctx)
    assert int(steps[-1].valid.sum()) == int(plain[-1].valid.sum()) == 8
    moved = (steps[-1].features != ctx.features).any(2) & steps[-1].valid
    assert int(moved.sum()) >= 1
    assert not ((plain[-1].features != ctx.features).any(2) & plain[-1].valid).any()


def test_sparsevlm_raters_are_those_that_relate_to_the_picture():
    visual, text = torch.eye(4)[:1].repeat(3, 1)[None], torch.eye(4)[[0, 2, 3]][None] * 3
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert relevant(visual, mask, text, mask).tolist() == [[True, False, False]]
    assert relevant(visual, mask, text * 0, mask).tolist() == [[True, True, True]]


def test_dart_keeps_pivots_and_what_is_unlike_them():
    ctx = make_context(GRID)
    states = ctx.features[0].clone()
    states[:18] = states[0]
    ctx.hidden[0, ctx.visual[0]] = states
    chosen = run(vtoken.DART(keep=8, pivots=1, text_pivots=0, norm="states"), ctx)[-1].valid[0].nonzero()[:, 0].tolist()
    pivot = int(states.norm(dim=1).argmax())
    assert pivot in chosen
    rest = nn.functional.cosine_similarity(states, states[pivot], 1).argsort()[:7].tolist()
    assert set(rest) <= set(chosen)


@pytest.mark.parametrize(("norm", "power"), [("keys", 2), ("keys_l1", 1)])
def test_dart_takes_the_longest_keys_of_the_layer_before_for_pivots(norm, power):
    ctx = make_context(GRID)
    length = attend(ctx, 1, "last").keys.transpose(1, 2).flatten(2).norm(p=power, dim=2)[0]
    visual = length[ctx.visual[0]].topk(2).indices.tolist()
    chosen = run(vtoken.DART(keep=2, pivots=2, text_pivots=0, norm=norm), ctx)[-1].valid[0].nonzero()[:, 0].tolist()
    assert chosen == sorted(visual)


def test_dart_takes_what_is_unlike_the_longest_word_too():
    ctx = make_context(GRID)
    length = attend(ctx, 1, "last").keys.transpose(1, 2).flatten(2).norm(dim=2)[0]
    pivot = int(length[ctx.visual[0]].argmax())
    index = ctx.rows("question")[0][0]
    word = ctx.hidden[0, index[length[index].argmax()]]
    to_pivot, to_word = (nn.functional.cosine_similarity(ctx.features[0], x, 1) for x in (ctx.features[0, pivot], word))
    first = int(to_pivot.argmin())
    to_word[[pivot, first]] = 1.0
    chosen = run(vtoken.DART(keep=3, pivots=1, text_pivots=1, norm="keys"), ctx)[-1].valid[0].nonzero()[:, 0].tolist()
    assert chosen == sorted([pivot, first, int(to_word.argmin())])


def test_dyvte_waits_for_patience_and_the_first_layer():
    ctx = make_context(*RAGGED)
    eager = run(vtoken.DyVTE(threshold=1.0), ctx)
    assert [int(c.valid.any()) for c in eager] == [1, 0, 0]
    patient = run(vtoken.DyVTE(threshold=1.0, patience=2), make_context(*RAGGED))
    assert [int(c.valid.any()) for c in patient] == [1, 1, 0]
    never = run(vtoken.DyVTE(threshold=0.0), make_context(*RAGGED))[-1]
    assert torch.equal(never.valid, ctx.valid)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_dyvte_reads_a_gate(tmp_path, suffix):
    tensors = {}
    for layer in range(3, DEPTH):
        gate = nn.Sequential(nn.Linear(2 * WIDTH, 12, bias=False), nn.GELU(), nn.Linear(12, 2, bias=False))
        tensors |= {f"{layer}.{name}": value.detach() for name, value in gate.state_dict().items()}
    path = tmp_path / f"gate.{suffix}"
    if suffix == "pt":
        torch.save(tensors, path)
    else:
        from safetensors.torch import save_file

        save_file(tensors, path)
    reducer = vtoken.DyVTE(exit="gate", gate=str(path))
    ctx = make_context(*RAGGED)
    steps = run(reducer, ctx)
    assert len(steps) == 1 + len(reducer.layers(DEPTH))
    first = reducer.layers(DEPTH)[0]
    text = make_context(GRID)
    summary = torch.cat([text.hidden[0, -6:-1].mean(0), text.hidden[0, -1]])[None]
    down, out = tensors[f"{first - 1}.0.weight"], tensors[f"{first - 1}.2.weight"]
    logits = nn.functional.gelu(summary @ down.T) @ out.T
    left = run(reducer, text)[1].valid.any()
    assert bool(left) == bool(logits[0, 0] >= logits[0, 1])


def test_dyvte_refuses_what_is_no_gate(tmp_path):
    with pytest.raises(ValueError, match="no gate checkpoint"):
        load_gates(str(tmp_path / "missing.pt"))
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no gate"):
        load_gates(str(tmp_path / "other.pt"))
    torch.save({"3.0.weight": torch.ones(2, 5), "3.2.weight": torch.ones(2, 7)}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="no gate of layer 3"):
        load_gates(str(tmp_path / "odd.pt"))
    tensors = {f"{n}.{part}.weight": torch.ones(2, width) for n in range(DEPTH) for part, width in ((0, 5), (2, 2))}
    torch.save(tensors, tmp_path / "narrow.pt")
    with pytest.raises(ValueError, match="trained for another model"):
        run(vtoken.DyVTE(exit="gate", gate=str(tmp_path / "narrow.pt")), make_context(GRID))


# ----------------------------------------------------------------------------------------------------------- views
def test_views_take_and_scatter_are_inverse():
    ctx = make_context(*RAGGED)
    views = Views.of(ctx)
    place = torch.arange(views.slots.shape[2]).expand_as(views.valid).masked_fill(~views.valid, -1)
    slots = torch.arange(ctx.longest).expand(ctx.items, -1)
    assert torch.equal(views.scatter(place, ctx.longest), slots.masked_fill(~ctx.candidates, -1))
    values = views.take(ctx.features[..., 0])
    out = views.spread(values, torch.zeros(ctx.items, ctx.longest))
    assert torch.equal(out, ctx.features[..., 0].masked_fill(~ctx.candidates, 0.0))
    budget = torch.tensor([10, 20, 3, 9, 1, 5])
    assert torch.equal(views.share(budget).view(views.counts.shape).sum(1), budget)
