# SPDX-License-Identifier: Apache-2.0
"""Lazy evaluation gives the picks of the full greedy, and computes less: pools, ties, memory, the Triton kernel."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from vtoken import ops
from vtoken.ops import lazy, nested, triton_greedy
from vtoken.ops.cosines import Cosines
from vtoken.ops.max_min import most_isolated
from vtoken.profile.memory import LiveBytes

from . import naive
from .test_naive import SELECTIONS, Batch, agree

GREEDY = [name for name in SELECTIONS if name not in ("top_k", "coverage", "coverage add")]


@pytest.mark.parametrize("name", GREEDY)
def test_small_pools_change_nothing(name, monkeypatch):
    """Many pools, so that the tokens outside have to catch up many times; for `max_sum`, drafts that do not hold."""
    monkeypatch.setattr(nested, "POOL", 5)
    monkeypatch.setattr(nested, "LONG", 2)
    monkeypatch.setattr(Cosines, "whole", lambda self, most: self)
    monkeypatch.setattr(sys.modules["vtoken.ops.max_sum"], "POOL", 8)
    monkeypatch.setattr(sys.modules["vtoken.ops.max_sum"], "DRAFT", 6)
    monkeypatch.setattr(sys.modules["vtoken.ops.max_sum"], "ALIKE", 2)
    batch = Batch(3, tokens=90, width=20)
    batch.k = torch.tensor([30, 11, 25]) if name != "dpp" else torch.tensor([9, 5, 8])
    select, expected = SELECTIONS[name]
    agree(select(batch), batch, expected)


@pytest.mark.parametrize("name", ["k_center", "max_min", "sads", "dpp"])
def test_ties_beyond_a_pool_go_to_the_lowest_token(name, monkeypatch):
    monkeypatch.setattr(nested, "POOL", 4)
    monkeypatch.setattr(Cosines, "whole", lambda self, most: self)
    batch = Batch(0, tokens=40)
    batch.x, batch.scores = torch.eye(40).repeat(3, 1, 1), torch.ones(3, 40)
    batch.valid = torch.ones(3, 40, dtype=torch.bool)
    batch.valid[1, ::3] = False
    found = SELECTIONS[name][0](batch)
    for row, valid, k in zip(found, batch.valid, batch.k, strict=True):
        assert row[:k].tolist() == valid.nonzero()[:k, 0].tolist()


@pytest.mark.parametrize("name", [*GREEDY, "coverage", "coverage add"])
def test_without_host_syncs_the_picks_are_the_same(name, monkeypatch):
    """The loop of accelerators, which looks at its values once per pool."""
    batch = Batch(7, tokens=90, width=20)
    batch.k = torch.tensor([30, 11, 25]) if name != "dpp" else torch.tensor([9, 5, 8])
    select, _ = SELECTIONS[name]
    expected = select(batch)
    monkeypatch.setattr(lazy, "POOL_ON_DEVICE", 8)
    for module in ("lazy", "nested", "nearest", "max_min", "max_sum", "dpp", "coverage"):
        monkeypatch.setattr(sys.modules[f"vtoken.ops.{module}"], "on_host", lambda device: False)
    assert torch.equal(select(batch), expected)


@pytest.mark.parametrize("name", GREEDY)
def test_no_square_matrix_is_made(name):
    tokens, picks = 3000, 30
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, 16, generator=generator)
    w = torch.rand(1, tokens, generator=generator)
    calls = {"mmr": (w,), "mmr parallel": (w, picks, 0.5, 3), "sads": (w,), "dpp": (w,), "log_det": (picks, 0.3)}
    extra = calls.get(name, ())
    extra = extra if len(extra) > 1 else (*extra, picks)
    with LiveBytes() as seen:
        getattr(ops, name.split()[0])(x, *extra)
    assert seen.largest < 4 * tokens * tokens / 4
    assert seen.peak < 4 * tokens * tokens / 2


def test_few_similarities_are_computed(monkeypatch):
    """Most columns of the matrix are never needed."""
    asked = []
    columns = Cosines.columns

    def counted(self, index):
        asked.append(index.shape[1] * self.shape[1])
        return columns(self, index)

    monkeypatch.setattr(Cosines, "columns", counted)
    x = torch.randn(1, 1500, 64, generator=torch.Generator().manual_seed(0))
    found = ops.k_center(x, 150)
    assert found[0].tolist() == naive_k_center(x[0], 150)
    assert sum(asked) <= 150 * 1500


def naive_k_center(x, k):
    cos = naive.cosines(x)
    picks, nearest = [0], cos[0].clone()
    while len(picks) < k:
        nearest[picks[-1]] = float("inf")
        picks.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, cos[picks[-1]]).index_fill(0, torch.tensor(picks), float("inf"))
    return picks


def test_without_triton_there_is_no_kernel(monkeypatch):
    assert not triton_greedy.available(torch.device("cpu"))
    monkeypatch.setattr(triton_greedy, "triton", None)
    assert not triton_greedy.available(torch.device("cuda"))


SCRIPT = """
import sys, torch
from vtoken.ops import k_center, lazy, max_sum, mmr, nearest, nested, sads, triton_greedy
from vtoken.ops.cosines import Cosines
g = torch.Generator().manual_seed(0)
x, w = torch.randn(3, 60, 16, generator=g), torch.rand(3, 60, generator=g)
valid = torch.rand(3, 60, generator=g) < torch.tensor([[0.9], [0.5], [1.0]])
k = torch.tensor([14, 5, 20])
lazy.POOL_ON_DEVICE = 12
calls = [
    lambda: k_center(x, k, valid=valid), lambda: mmr(x, w, k, 0.4, valid=valid), lambda: sads(x, w, k, valid),
    lambda: nearest.pick(Cosines(x, valid), k, valid, w, add=True),
]
host = [call() for call in calls]
kernel, used = triton_greedy.serve, []
triton_greedy.available = lambda device: True
maxsum = sys.modules["vtoken.ops.max_sum"]
lazy.on_host = nested.on_host = nearest.on_host = maxsum.on_host = lambda device: False
triton_greedy.serve = lambda *args: used.append(1) or kernel(*args)
for call, expected in zip(calls, host):
    before = len(used)
    assert torch.equal(call(), expected)
    assert len(used) > before
torch.testing.assert_close(host[3], max_sum(x, k, w.masked_fill(~valid, -1).argmax(1), valid))
print("same", len(used))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_triton_kernel_in_its_interpreter_picks_what_the_host_does():
    """The interpreter is chosen when Triton is imported, hence a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("same")


@pytest.mark.parametrize("name", ["k_center", "max_sum", "max_min"])
def test_short_rows_with_all_similarities_at_hand_give_the_same(name, monkeypatch):
    batch = Batch(3, tokens=90, width=20)
    batch.k = torch.tensor([30, 11, 25])
    select, expected = SELECTIONS[name]
    made, whole = [], Cosines.whole
    monkeypatch.setattr(Cosines, "units", lambda *_: pytest.fail("needs products of its own"))
    monkeypatch.setattr(Cosines, "whole", lambda self, most: made.append(whole(self, most)) or made[-1])
    agree(select(batch), batch, expected)
    assert len({id(found.table) for found in made}) == 3, "once a row, of all tokens"
    assert all(found.table is not None for found in made)


@pytest.mark.parametrize("tokens", [1, 4, 6, 11])
def test_a_table_holds_the_cosines_of_all_pairs(tokens):
    x = torch.randn(1, tokens, 7, generator=torch.Generator().manual_seed(0))
    x[0, tokens // 2] = 0
    found = Cosines(x, torch.ones(1, tokens, dtype=torch.bool)).whole(tokens).table
    torch.testing.assert_close(found[0], naive.cosines(x[0]).float())


@pytest.mark.parametrize(("width", "table"), [(300, True), (200, False)])
def test_where_drafts_do_not_hold_all_cosines_are_computed_if_they_are_fewer_than_features(width, table, monkeypatch):
    monkeypatch.setattr(sys.modules["vtoken.ops.max_sum"], "SHORT", 0)
    made, whole = [], Cosines.whole
    monkeypatch.setattr(Cosines, "whole", lambda self, most: made.append(whole(self, most)) or made[-1])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(250, 4, generator=generator) @ torch.randn(4, width, generator=generator)
    assert ops.max_sum(x[None], 60)[0].tolist() == naive.max_sum(x, 60)
    assert any(found.table is not None for found in made) == table


def test_tokens_that_are_all_alike_are_not_compared_in_one_matrix(monkeypatch):
    """None of them leaves the race."""
    widths = []
    columns = Cosines.columns
    monkeypatch.setattr(Cosines, "columns", lambda self, index: widths.append(index.shape[1]) or columns(self, index))
    part = Cosines(torch.ones(1, 1500, 16), torch.ones(1, 1500, dtype=torch.bool))
    assert most_isolated(part) == 0
    assert 0 < max(widths) <= 32


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_most_isolated_token_is_found_with_and_without_the_matrix(seed, table):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(20, 12, generator=generator)
    x = centres[torch.randint(20, (2, 900), generator=generator)] + 0.3 * torch.randn(2, 900, 12, generator=generator)
    valid = torch.rand(2, 900, generator=generator) < torch.tensor([[0.8], [1.1]])
    for row, mask in enumerate(valid):
        tokens = mask.nonzero()[:, 0]
        part = Cosines(x, valid).part(row, tokens)
        found = most_isolated(part.whole(len(tokens)) if table else part)
        assert found == int(naive.cosines(x[row, tokens]).fill_diagonal_(-1).amax(1).argmin())
