# SPDX-License-Identifier: Apache-2.0
"""Operations against plain references on ragged batches, and on the inputs that break naive code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vtoken import ops
from vtoken.ops import cosines

from . import naive

SEEDS = pytest.mark.parametrize("seed", range(4))


class Batch:
    """A ragged batch with holes: features (3, N, D), scores (3, N), valid, and a count for each row."""

    def __init__(self, seed: int, tokens: int = 40, width: int = 24) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(3, tokens, width, generator=generator)
        self.scores = torch.rand(3, tokens, generator=generator) + 0.01
        self.valid = torch.rand(3, tokens, generator=generator) < torch.tensor([[0.9], [0.6], [1.1]])
        self.k = torch.tensor([7, 5, 12])

    def rows(self):
        for b, mask in enumerate(self.valid):
            slots = mask.nonzero()[:, 0]
            yield self.x[b][slots], self.scores[b][slots], int(self.k[b]), slots


def agree(found: Tensor, batch: Batch, expected) -> None:
    """``expected(x, scores, k)`` gives picks among the valid tokens of a row."""
    assert found.dtype == torch.long
    assert found.shape == (3, int(batch.k.max()))
    for row, (x, scores, k, slots) in zip(found, batch.rows(), strict=True):
        picks = slots[expected(x, scores, k)]
        assert row[: len(picks)].tolist() == picks.tolist()
        assert (row[len(picks) :] == -1).all()


SELECTIONS = {
    "top_k": (
        lambda b: ops.top_k(b.scores, b.k, b.valid),
        lambda x, s, k: naive.top_k(s, k),
    ),
    "k_center": (
        lambda b: ops.k_center(b.x, b.k, valid=b.valid),
        lambda x, s, k: naive.k_center(x, k),
    ),
    "max_sum": (
        lambda b: ops.max_sum(b.x, b.k, valid=b.valid),
        lambda x, s, k: naive.max_sum(x, k),
    ),
    "max_min": (
        lambda b: ops.max_min(b.x, b.k, b.valid),
        lambda x, s, k: naive.max_min(x, k),
    ),
    "mmr": (
        lambda b: ops.mmr(b.x, b.scores, b.k, 0.4, valid=b.valid),
        lambda x, s, k: naive.mmr(x, s, k, 0.4),
    ),
    "mmr parallel": (
        lambda b: ops.mmr(b.x, b.scores, b.k, 0.4, 3, valid=b.valid),
        lambda x, s, k: naive.mmr(x, s, k, 0.4, 3),
    ),
    "sads": (
        lambda b: ops.sads(b.x, b.scores, b.k, b.valid),
        lambda x, s, k: naive.sads(x, s, k),
    ),
    "dpp": (
        lambda b: ops.dpp(b.x, b.scores, b.k, b.valid),
        lambda x, s, k: naive.dpp(x, s, k),
    ),
    "log_det": (
        lambda b: ops.log_det(b.x, b.k, 0.3, b.valid),
        lambda x, s, k: naive.log_det(x, k, 0.3),
    ),
    "coverage": (
        lambda b: ops.coverage(b.x, b.scores, b.k, 1.5, b.valid),
        lambda x, s, k: naive.coverage(x, s, k, 1.5, "multiply"),
    ),
    "coverage add": (
        lambda b: ops.coverage(b.x, b.scores, b.k, 1.0, b.valid, "add"),
        lambda x, s, k: naive.coverage(x, s, k, 1.0, "add"),
    ),
}
every_selection = pytest.mark.parametrize("name", list(SELECTIONS))
GREEDY = [name for name in SELECTIONS if name != "top_k"]


@SEEDS
@every_selection
def test_selection_on_a_ragged_batch(name, seed):
    batch = Batch(seed)
    select, expected = SELECTIONS[name]
    agree(select(batch), batch, expected)


@pytest.mark.parametrize("name", GREEDY)
def test_blocks_of_candidates_change_nothing(name):
    """More tokens than one block of precomputed columns holds, and picks from several blocks."""
    batch = Batch(9, tokens=150, width=6)
    batch.k = torch.tensor([30, 11, 25]) if name != "dpp" else torch.tensor([6, 5, 4])
    select, expected = SELECTIONS[name]
    agree(select(batch), batch, expected)


@pytest.mark.parametrize("name", GREEDY)
def test_of_many_tokens_columns_are_computed_one_by_one(name, monkeypatch):
    monkeypatch.setattr(cosines, "DENSE", 0)
    batch = Batch(9, tokens=150, width=6)
    batch.k = torch.tensor([30, 11, 25]) if name != "dpp" else torch.tensor([6, 5, 4])
    select, expected = SELECTIONS[name]
    agree(select(batch), batch, expected)


@every_selection
def test_a_row_is_chosen_as_it_is_alone(name):
    batch = Batch(5)
    select, _ = SELECTIONS[name]
    together = select(batch)
    for row in range(3):
        one = Batch(5)
        for field in ("x", "scores", "valid", "k"):
            setattr(one, field, getattr(batch, field)[row : row + 1])
        assert together[row, : int(batch.k[row])].tolist() == select(one)[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_selection
def test_half_precision_is_computed_in_float32(name, dtype):
    half, full = Batch(2), Batch(2)
    half.x, half.scores = half.x.to(dtype), half.scores.to(dtype)
    full.x, full.scores = half.x.float(), half.scores.float()
    select, _ = SELECTIONS[name]
    assert torch.equal(select(half), select(full))


@every_selection
def test_more_than_there_is_means_all(name):
    batch = Batch(3, tokens=9)
    batch.k = torch.tensor([50, 1, 0])
    found = SELECTIONS[name][0](batch)
    assert found.shape[1] == int(batch.valid[0].sum())
    assert sorted(found[0].tolist()) == batch.valid[0].nonzero()[:, 0].tolist()
    assert (found[1] >= 0).sum() == 1
    assert (found[2] == -1).all()


@every_selection
def test_one_token_and_an_int_count(name):
    batch = Batch(1, tokens=1)
    batch.valid, batch.k = torch.ones(3, 1, dtype=torch.bool), 1
    assert SELECTIONS[name][0](batch).tolist() == [[0], [0], [0]]


@every_selection
def test_identical_tokens_are_picked_once_each(name):
    batch = Batch(0, tokens=12)
    batch.x, batch.scores = torch.ones_like(batch.x), torch.ones_like(batch.scores)
    batch.valid, batch.k = torch.ones_like(batch.valid), torch.tensor([5, 12, 1])
    found = SELECTIONS[name][0](batch)
    for row, k in zip(found, (5, 12, 1), strict=True):
        assert len(set(row[:k].tolist())) == k
        assert row[0] == 0


def test_ties_go_to_the_lowest_index():
    assert ops.top_k(torch.tensor([[1.0, 3.0, 3.0, 2.0, 2.0]]), 4).tolist() == [[1, 2, 3, 4]]
    corners = torch.eye(4).repeat_interleave(2, 0)[None]  # pairs of identical, mutually orthogonal tokens
    for select in (ops.k_center, ops.max_sum):
        assert select(corners, 4).tolist() == [[0, 2, 4, 6]]
    assert ops.sads(corners, torch.ones(1, 8), 4).tolist() == [[0, 2, 4, 6]]
    assert ops.dpp(corners, torch.ones(1, 8), 4).tolist() == [[0, 2, 4, 6]]
    assert ops.coverage(corners, torch.ones(1, 8), 4).tolist() == [[0, 2, 4, 6]]


def test_dpp_beyond_the_rank_goes_by_relevance():
    x = torch.eye(2).repeat(4, 1)[None]
    relevance = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.9, 0.8, 0.7, 0.6]])
    assert ops.dpp(x, relevance, 8).tolist() == [[4, 5, 6, 7, 3, 2, 1, 0]]


def test_start_is_the_first_pick():
    batch = Batch(4)
    start = torch.tensor([int(mask.nonzero()[-1]) for mask in batch.valid])
    for select in (ops.k_center, ops.max_sum):
        assert select(batch.x, batch.k, start, batch.valid)[:, 0].tolist() == start.tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@every_selection
def test_values_that_are_not_finite_are_named(name, value):
    batch = Batch(0)
    batch.valid[1, 6] = True
    (batch.scores if name == "top_k" else batch.x)[1, 6] = value
    with pytest.raises(ValueError, match=r"token 6 in row 1 are not finite"):
        SELECTIONS[name][0](batch)
    batch.valid[1, 6] = False  # what is masked may hold anything
    SELECTIONS[name][0](batch)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, s: ops.top_k(s, -1), "k=-1"),
        (lambda x, s: ops.top_k(s, torch.tensor([1, 2])), "one count for each of 3 rows"),
        (lambda x, s: ops.top_k(s, 1, torch.ones(3, 5, dtype=torch.bool)), "valid has shape"),
        (lambda x, s: ops.k_center(x, 2, torch.tensor([0, 99, 0])), "start=.0, 99, 0."),
        (lambda x, s: ops.k_center(x, 2, torch.tensor([0, 1, 0]), torch.tensor([[True, False]] * 3)), "not valid"),
        (lambda x, s: ops.mmr(x, s, 2, lam=1.5), "lam=1.5"),
        (lambda x, s: ops.mmr(x, s, 2, parallel=0), "parallel=0"),
        (lambda x, s: ops.coverage(x, s, 2, combine="max"), "combine='max'"),
        (lambda x, s: ops.coverage(x, s - 2, 2), "at least 0"),
        (lambda x, s: ops.bipartite_merge(x, x, 1, valid=torch.tensor([[False, True]] * 3)), "holes"),
        (lambda x, s: ops.bipartite_merge(x, x, -1), "k=-1"),
        (lambda x, s: ops.page_rank(x.new_zeros(1, 1, 2, 2), temperature=0), "temperature=0"),
        (lambda x, s: ops.page_rank(x.new_full((1, 1, 2, 2), float("nan"))), "NaN"),
    ],
)
def test_a_wrong_argument_is_a_sentence(call, words):
    x = torch.randn(3, 2, 4)
    with pytest.raises(ValueError, match=words):
        call(x, x.norm(dim=2))


# -------------------------------------------------------------------------------------------------------- merging
@SEEDS
@pytest.mark.parametrize("weighted", [False, True])
def test_bipartite_merge_on_a_ragged_batch(seed, weighted):
    generator = torch.Generator().manual_seed(seed)
    metric, x = torch.randn(3, 15, 5, generator=generator), torch.randn(3, 15, 4, generator=generator)
    sizes = torch.randint(1, 4, (3, 15), generator=generator).float()
    tokens, r = torch.tensor([15, 9, 1]), torch.tensor([4, 20, 3])
    valid = torch.arange(15) < tokens[:, None]
    merged = ops.bipartite_merge(metric, x, r, sizes if weighted else None, valid)
    for b, n in enumerate(tokens.tolist()):
        rows, source = naive.bipartite(metric[b, :n], x[b, :n], int(r[b]), sizes[b, :n] if weighted else None)
        assert merged.source[b, :n].tolist() == source
        assert (merged.source[b, n:] == -1).all()
        torch.testing.assert_close(merged.features[b, : len(rows)].double(), rows, atol=1e-5, rtol=1e-5)
        assert not merged.features[b, len(rows) :].any()
    if weighted:
        found = ops.row_sizes(merged.source, merged.features.shape[1], sizes)
        assert found.sum(1).tolist() == (sizes * valid).sum(1).tolist()


def test_a_protected_first_token_is_never_merged():
    metric = torch.ones(1, 9, 3)
    merged = ops.bipartite_merge(metric, metric, 4, protect_first=True)
    assert merged.source[0, 0] == 0
    assert (merged.source[0] == 0).sum() == 1


@SEEDS
def test_cluster_merge_on_a_ragged_batch(seed):
    batch = Batch(seed, tokens=25)
    centres = ops.density_peaks(batch.x, batch.k, batch.valid)
    merged = ops.cluster_merge(batch.x, batch.k, batch.valid)
    for b, (x, _, k, slots) in enumerate(batch.rows()):
        peaks, source = naive.clusters(x, k)
        assert centres[b, :k].tolist() == slots[peaks].tolist()
        assert merged.source[b][slots].tolist() == source
        for number in range(k):
            members = [i for i, s in enumerate(source) if s == number]
            torch.testing.assert_close(merged.features[b, number], x[members].mean(0))


def test_identical_tokens_make_as_many_clusters_as_asked():
    merged = ops.cluster_merge(torch.ones(1, 6, 3), 3)
    assert sorted(set(merged.source[0].tolist())) == [0, 1, 2]
    assert merged.features.isfinite().all()


@SEEDS
@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_page_rank(seed, damping):
    logits = torch.randn(2, 3, 11, 11, generator=torch.Generator().manual_seed(seed))
    logits = logits.masked_fill(torch.ones(11, 11).triu(1).bool(), float("-inf"))
    found = ops.page_rank(logits, 0.5, 4, damping)
    for b in range(2):
        torch.testing.assert_close(found[b].double(), naive.page_rank(logits[b], 0.5, 4, damping), atol=1e-6, rtol=1e-5)


def test_page_rank_of_a_padded_row_is_that_of_the_row_alone():
    logits = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    padded = torch.full((1, 2, 11, 11), float("-inf"))
    padded[..., 3:, 3:] = logits
    valid = torch.arange(11)[None] >= 3
    found = ops.page_rank(padded, valid=valid)
    torch.testing.assert_close(found[:, 3:], ops.page_rank(logits))
    assert not found[:, :3].any()


def test_no_square_matrix_of_all_tokens_is_formed():
    """20 000 tokens: all their similarities would be 400 million numbers, a block of them is a million."""
    x = torch.randn(1, 20_000, 8, generator=torch.Generator().manual_seed(0))
    with _Watch() as watch:
        ops.mmr(x, x[..., 0], 20)
        ops.k_center(x, 20)
        ops.dpp(x, x[..., 0].abs(), 6)
        ops.max_sum(x, 6)
    assert 0 < watch.biggest < 200 * 20_000


class _Watch(TorchDispatchMode):
    """Records the size of the largest tensor that an operation returns."""

    biggest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.biggest = max(self.biggest, value.numel())
        return out
