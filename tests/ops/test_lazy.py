# SPDX-License-Identifier: Apache-2.0
"""How the picks are found changes none of them: pools, tables, columns, devices, threads, the Triton kernel."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from vtoken import ops
from vtoken.ops import cosines, lazy, loop, triton_greedy
from vtoken.ops.cosines import Cosines
from vtoken.profile.memory import LiveBytes

from . import naive
from .test_naive import GREEDY, SELECTIONS, Batch, agree

LAZY = ["k_center", "mmr", "mmr parallel", "sads"]


def wide(name: str) -> Batch:
    """Rows of which many tokens are picked, as far as the determinants of float32 tell them apart."""
    batch = Batch(3, tokens=90, width=20)
    batch.k = torch.tensor([30, 11, 25]) if name != "dpp" else torch.tensor([9, 5, 8])
    return batch


@pytest.mark.parametrize("pool", [1, 5, 40])
@pytest.mark.parametrize("name", LAZY)
def test_small_pools_change_nothing(name, pool, monkeypatch):
    """Many pools, so that the tokens outside have to catch up many times."""
    monkeypatch.setattr(lazy, "POOL", pool)
    monkeypatch.setattr(lazy, "WHOLE", 1)
    batch = wide(name)
    select, expected = SELECTIONS[name]
    agree(select(batch), batch, expected)


@pytest.mark.parametrize("name", [*LAZY, "max_min", "dpp"])
def test_ties_go_to_the_lowest_token_within_a_pool_and_beyond(name, monkeypatch):
    monkeypatch.setattr(lazy, "POOL", 4)
    monkeypatch.setattr(lazy, "WHOLE", 1)
    batch = Batch(0, tokens=40)
    batch.x, batch.scores = torch.eye(40).repeat(3, 1, 1), torch.ones(3, 40)
    batch.valid = torch.ones(3, 40, dtype=torch.bool)
    batch.valid[1, ::3] = False
    found = SELECTIONS[name][0](batch)
    for row, valid, k in zip(found, batch.valid, batch.k, strict=True):
        assert row[:k].tolist() == valid.nonzero()[:k, 0].tolist()


@pytest.mark.parametrize("name", GREEDY)
def test_on_an_accelerator_the_picks_are_the_same(name, monkeypatch):
    """All rows of a batch at once, each pick without a look at a value."""
    batch = wide(name)
    select, _ = SELECTIONS[name]
    expected = select(batch)
    for module in ("loop", "greedy"):
        monkeypatch.setattr(sys.modules[f"vtoken.ops.{module}"], "on_host", lambda device: False)
    assert torch.equal(select(batch), expected)


@pytest.mark.parametrize("name", GREEDY)
def test_no_square_matrix_of_many_tokens_is_made(name, monkeypatch):
    monkeypatch.setattr(cosines, "DENSE", 1000)
    tokens, picks = 3000, 30
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, 16, generator=generator)
    w = torch.rand(1, tokens, generator=generator)
    calls = {
        "mmr": (w,),
        "mmr parallel": (w, picks, 0.5, 3),
        "sads": (w,),
        "dpp": (w,),
        "log_det": (picks, 0.3),
        "coverage": (w,),
        "coverage add": (w, picks, 1.0, None, "add"),
    }
    extra = calls.get(name, ())
    extra = extra if len(extra) > 1 else (*extra, picks)
    with LiveBytes() as seen:
        getattr(ops, name.split()[0])(x, *extra)
    assert seen.largest < 4 * tokens * tokens / 4
    assert seen.peak < 4 * tokens * tokens


@pytest.mark.parametrize(("tokens", "width", "table"), [(60, 5, True), (90, 5, False), (90, 200, True)])
def test_a_table_is_kept_where_it_is_small_or_no_larger_than_the_features(tokens, width, table, monkeypatch):
    monkeypatch.setattr(cosines, "DENSE", 64)
    found = Cosines(torch.ones(1, tokens, width), torch.ones(1, tokens, dtype=torch.bool)).whole()
    assert (found.table is not None) == table


def test_few_similarities_are_computed(monkeypatch):
    """Most columns of the matrix are never needed."""
    asked = []
    columns = Cosines.columns

    def counted(self, index):
        asked.append(index.shape[1] * self.shape[1])
        return columns(self, index)

    monkeypatch.setattr(Cosines, "columns", counted)
    monkeypatch.setattr(Cosines, "whole", lambda self: pytest.fail("computes them all"))
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


@pytest.mark.parametrize("tokens", [1, 4, 6, 11])
def test_a_table_holds_the_cosines_of_all_pairs(tokens):
    x = torch.randn(1, tokens, 7, generator=torch.Generator().manual_seed(0))
    x[0, tokens // 2] = 0
    found = Cosines(x, torch.ones(1, tokens, dtype=torch.bool)).whole().table
    torch.testing.assert_close(found[0], naive.cosines(x[0]).float())


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", GREEDY)
def test_steps_run_in_one_thread_and_all_are_back_afterwards(name, two_threads, monkeypatch):
    """A step looks at columns; the table before it is made by all threads."""
    seen, made = [], []
    columns, whole = Cosines.columns, Cosines.whole
    of_kernel = ops.determinant._Kernel.column
    monkeypatch.setattr(Cosines, "columns", lambda *args: seen.append(torch.get_num_threads()) or columns(*args))
    monkeypatch.setattr(Cosines, "whole", lambda *args: made.append(torch.get_num_threads()) or whole(*args))
    monkeypatch.setattr(
        ops.determinant._Kernel, "column", lambda *args: seen.append(torch.get_num_threads()) or of_kernel(*args)
    )
    SELECTIONS[name][0](wide(name))
    assert seen[-1] == 1
    assert set(made) <= {2}
    assert torch.get_num_threads() == 2


def test_all_threads_are_back_after_an_error(two_threads):
    def fail():
        with loop.one_thread(torch.device("cpu"), 9):
            assert torch.get_num_threads() == 1
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        fail()
    assert torch.get_num_threads() == 2


def test_elsewhere_than_on_the_host_threads_stay(two_threads):
    with loop.one_thread(torch.device("meta"), 9):
        assert torch.get_num_threads() == 2


def test_large_steps_run_in_all_threads(two_threads):
    with loop.one_thread(torch.device("cpu"), 10**8):
        assert torch.get_num_threads() == 2


def test_without_triton_there_is_no_kernel(monkeypatch):
    assert not triton_greedy.available(torch.device("cpu"))
    monkeypatch.setattr(triton_greedy, "triton", None)
    assert not triton_greedy.available(torch.device("cuda"))


SCRIPT = """
import torch
from vtoken.ops import greedy, k_center, loop, max_min, max_sum, mmr, sads, triton_greedy
g = torch.Generator().manual_seed(0)
x, w = torch.randn(3, 60, 16, generator=g), torch.rand(3, 60, generator=g)
valid = torch.rand(3, 60, generator=g) < torch.tensor([[0.9], [0.5], [1.0]])
k = torch.tensor([14, 5, 20])
calls = [
    lambda: k_center(x, k, valid=valid), lambda: mmr(x, w, k, 0.4, valid=valid), lambda: sads(x, w, k, valid),
    lambda: max_sum(x, k, valid=valid), lambda: max_min(x, k, valid),
]
host = [call() for call in calls]
kernel, used = triton_greedy.serve, []
triton_greedy.available = lambda device: True
loop.on_host = greedy.on_host = lambda device: False
triton_greedy.serve = lambda *args: used.append(1) or kernel(*args)
for call, expected in zip(calls, host):
    before = len(used)
    assert torch.equal(call(), expected)
    assert len(used) > before
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
