# SPDX-License-Identifier: Apache-2.0
"""The benchmark scripts run end to end, and the baselines are what they claim to be."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
NAIVE = FOLDER.parent / "tests" / "ops" / "naive.py"


@pytest.fixture
def script(monkeypatch):
    """A benchmark as a module, and its ``main`` with arguments."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name, *args):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--threads", "1", *args])
        return importlib.import_module(name)

    return load


@pytest.mark.parametrize("name", ["k_center", "max_sum", "max_min", "mmr", "sads", "dpp", "coverage"])
def test_baselines_pick_what_naive_loops_pick(script, name):
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(40, 24, generator=generator), torch.rand(40, generator=generator) + 0.1
    baselines = script("baselines")
    spec = importlib.util.spec_from_file_location("naive", NAIVE)
    naive = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(naive)
    extra = (w,) if name in baselines.WEIGHTED else ()
    more = {"mmr": (0.5,), "coverage": (1.0, "multiply")}.get(name, ())
    assert baselines.BASELINES[name](x, *extra, 6).tolist() == getattr(naive, name)(x, *extra, 6, *more)


def test_a_race_measures_each_in_turn(script):
    order = []
    found = script("harness").race({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 4
    assert set(found["a"]) == {"median", "iqr", "speedup"}
    assert found["a"]["speedup"] == 1.0


def test_the_gpu_run_works_on_tiny_shapes(script, tmp_path, monkeypatch):
    out = tmp_path / "gpu.json"
    module = script("gpu_all", "--device", "cpu", "--small", "--rounds", "1", "--out", str(out))
    monkeypatch.setattr(module, "BASELINES", {"mmr": module.BASELINES["mmr"]})
    monkeypatch.setattr(module.encoder_scores, "TOWERS", {"clip-l": "llava-1.5-7b"})
    assert module.main() == 0
    report = json.loads(out.read_text())
    assert set(report["results"]["parts"]) == {
        "selection",
        "prefill llava-tiny",
        "batches llava-tiny",
        "encoder clip-l",
    }
    assert report["results"]["failed"] == {}
    assert torch.__version__.startswith(report["surroundings"]["torch"])


def test_a_part_that_fails_is_recorded(script, tmp_path, monkeypatch):
    out = tmp_path / "gpu.json"
    module = script("gpu_all", "--device", "cpu", "--small", "--out", str(out))
    monkeypatch.setattr(module, "parts", lambda args: {"bad": lambda: 1 / 0, "good": lambda: 1})
    assert module.main() == 1
    results = json.loads(out.read_text())["results"]
    assert results["failed"] == {"bad": "ZeroDivisionError: division by zero"}
    assert results["parts"] == {"good": 1}
