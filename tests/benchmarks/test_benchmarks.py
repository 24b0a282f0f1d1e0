# SPDX-License-Identifier: Apache-2.0
"""The benchmark scripts run end to end, and the baselines are what they claim to be."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import vtoken

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


@pytest.mark.parametrize("name", ["k_center", "max_sum", "max_min", "mmr", "sads", "dpp", "log_det", "coverage"])
def test_baselines_pick_what_naive_loops_pick(script, name):
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(40, 24, generator=generator), torch.rand(40, generator=generator) + 0.1
    baselines = script("baselines")
    spec = importlib.util.spec_from_file_location("naive", NAIVE)
    naive = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(naive)
    extra = (w,) if name in baselines.WEIGHTED else ()
    more = {"mmr": (0.5,), "coverage": (1.0, "multiply"), "log_det": (0.01,)}.get(name, ())
    assert baselines.BASELINES[name](x, *extra, 6).tolist() == getattr(naive, name)(x, *extra, 6, *more)


def test_a_race_measures_each_in_turn(script):
    order = []
    found = script("harness").race({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 4
    assert set(found["a"]) == {"median", "iqr", "speedup"}
    assert found["a"]["speedup"] == 1.0


def test_the_gpu_run_works_on_tiny_shapes(script, tmp_path, monkeypatch):
    out = tmp_path / "gpu_all.json"
    module = script("gpu_all", "--device", "cpu", "--small", "--rounds", "1", "--out", str(out))
    monkeypatch.setattr(module, "BASELINES", {"mmr": module.BASELINES["mmr"]})
    monkeypatch.setattr(module.encoder_scores, "TOWERS", {"clip-l": "llava-1.5-7b"})
    assert module.main() == 0
    report = json.loads(out.read_text())
    assert set(report["results"]["parts"]) == {
        "selection",
        "prefill llava-tiny",
        "session llava-tiny",
        "batches llava-tiny",
        "encoder clip-l",
    }
    assert report["results"]["failed"] == {}
    assert torch.__version__.startswith(report["surroundings"]["torch"])
    shown = script("speed_tables").speed("gpu", tmp_path)
    assert "| selection, mmr gaussian |" in shown
    assert "| encoder scores, clip-l, dearest |" in shown


def test_a_part_that_fails_is_recorded(script, tmp_path, monkeypatch):
    out = tmp_path / "gpu.json"
    module = script("gpu_all", "--device", "cpu", "--small", "--out", str(out))
    monkeypatch.setattr(module, "parts", lambda args: {"bad": lambda: 1 / 0, "good": lambda: 1})
    assert module.main() == 1
    results = json.loads(out.read_text())["results"]
    assert results["failed"] == {"bad": "ZeroDivisionError: division by zero"}
    assert results["parts"] == {"good": 1}


@pytest.fixture
def tiny_shapes(monkeypatch):
    """Benchmarks on four thin layers."""
    from vtoken.profile import shapes

    def thin(name):
        config = shapes.shape_config("llava-tiny")
        config.text_config.num_hidden_layers = 4
        return config

    def load(module):
        monkeypatch.setattr(module, "shape_config", thin)
        return module

    return load


@pytest.mark.parametrize(
    ("block", "columns"),
    [("prefill", 8), ("batches", 6), ("memory", 7), ("overhead", 6), ("selection", 13), ("every_reducer", 8)],
)
def test_a_benchmark_writes_what_its_table_reads(block, columns, script, tiny_shapes, tmp_path):
    tables = script("speed_tables")
    name, _ = tables.TABLES[block]
    assert "Not measured yet" in tables.speed(block, tmp_path)
    module = script(name, "--quick", "--rounds", "1", "--out", str(tmp_path / f"{name}.json"))
    if hasattr(module, "shape_config"):
        tiny_shapes(module)
    module.main()
    text = tables.speed(block, tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 3
    assert {line.count(" | ") for line in rows} == {columns - 1}
    assert f"torch {torch.__version__}".split("+")[0] in text


def test_tables_of_the_towers(script, tiny_shapes, tmp_path, monkeypatch):
    tables = script("speed_tables")
    module = script("encoder_scores", "--quick", "--rounds", "1", "--out", str(tmp_path / "encoder_scores.json"))
    monkeypatch.setattr(module, "TOWERS", {"clip-l": "llava-1.5-7b"})
    module.main()
    assert "received attention of one picture of 1024 patches" in tables.speed("encoder", tmp_path).lower()
    module = script("tower_prune", "--quick", "--rounds", "1", "--out", str(tmp_path / "tower_prune.json"))
    chained = "tower keep=0.3 block=0.25, idpruner keep=0.1"
    monkeypatch.setattr(module, "TIMED", {chained: module.TIMED[chained]})
    monkeypatch.setattr(module, "accuracy", lambda *_: {"all": 0.5})
    tiny_shapes(module).main()
    text = tables.speed("first_token", tmp_path)
    assert f"| {chained} |" in text
    assert "≥ 2.2x: " in text
    assert "| 50.0 |" in text


def test_flat_pages_and_their_answers(script, tmp_path, monkeypatch):
    out = tmp_path / "documents.json"
    module = script("documents", "--quick", "--rounds", "1", "--documents", "2", "--out", str(out))
    config = module.shape_config("qwen2.5-vl-small")
    config.text_config.num_hidden_layers = 2
    monkeypatch.setattr(module, "shape_config", lambda name: config)
    monkeypatch.setattr(module, "ANSWERING", {"pixelprune": vtoken.PixelPrune()})
    module.main()
    found = json.loads(out.read_text())["results"]
    for kind, page in found["first_token"]["pages"].items():
        assert page["flat"] == 0.75
        kept = {name: one["kept"] for name, one in page["settings"].items() if "kept" in one}
        text = module.cells(kind, 12, np.random.default_rng(0))
        # white and random cells: a cell stays if it has text or stands behind or below some, as the method says
        beside, below = (np.roll(text, 1, axis) for axis in (1, 0))
        beside[:, 0] = below[0] = False
        assert text.mean() < kept["pixelprune"]["tokens"] <= (text | beside | below).mean() + 1 / text.size
        assert kept["divprune, as many tokens"]["tokens"] == kept["pixelprune"]["patches"]
        assert kept["ipcv, then divprune"]["tokens"] == kept["pixelprune"]["tokens"]
        assert kept["ipcv, then divprune"]["patches"] == pytest.approx(0.35, abs=0.01)
    noisy, printed = (found["answers"]["pages"][name]["pixelprune"] for name in ("mini_read", "printed"))
    assert (noisy["tokens"], noisy["same_answer"]) == (1.0, 1.0), "nothing repeats in noise"
    assert printed["tokens"] < 0.8


def test_memory_is_that_of_the_columns_each_layer_stores(script, tiny_shapes, tmp_path, monkeypatch):
    out = tmp_path / "memory.json"
    module = tiny_shapes(script("memory", "--out", str(out)))
    monkeypatch.setattr(module, "TOKENS", 64)
    module.main()
    found = json.loads(out.read_text())["results"]
    whole = found["unpruned"]
    assert whole["columns"] == [96] * 4
    assert found["vtw"]["columns"] == [96, 96, 32, 32]
    assert found["random keep=0.25"]["columns"] == [48] * 4
    for name, one in found.items():
        assert one["kv_bytes"] == sum(one["columns"]) * 2 * 64 * 4, name
        assert name == "unpruned" or one["peak_bytes"] < whole["peak_bytes"]


def test_a_target_is_met_or_missed(script):
    target = script("speed_tables").target
    assert target(0.9, 0.9, "at least 0.9") == "at least 0.9: met"
    assert target(0.89, 0.9, "at least 0.9") == "at least 0.9: **missed**"
    assert target(0.02, 0.03, "at most 3 %", at_most=True) == "at most 3 %: met"
    assert target(0.04, 0.03, "at most 3 %", at_most=True) == "at most 3 %: **missed**"


def test_all_scripts_run_although_one_fails(script, monkeypatch, capsys):
    ran = []

    class Done:
        def __init__(self, code):
            self.returncode = code

    def run(command):
        ran.append((command[1].stem, command[2:]))
        return Done(int(command[1].stem == "overhead"))

    module = script("run_all", "--rounds", "2")
    monkeypatch.setattr(module.subprocess, "run", run)
    assert module.main() == 1
    assert ran == [(name, ["--threads", "1", "--rounds", "2"]) for name in module.SCRIPTS]
    assert all((FOLDER / f"{name}.py").is_file() for name in module.SCRIPTS)
    assert "overhead: exit code 1" in capsys.readouterr().out


def test_weights_of_a_training_are_measured_beside_the_shipped_ones(script, tmp_path, monkeypatch):
    weights, tables = script("weights"), script("minis_tables")
    export = tmp_path / "run" / "export"
    shutil.copytree(weights.loader.folder("mini-llava"), export)
    (tmp_path / "run" / "times.json").write_text('{"tower": {"clock": 3.0, "processor": 2.0}}')
    _, _, digest = weights.load("mini-llava", export)
    assert digest == (export / "sha256").read_text().strip()
    assert weights.made_by(export) == {"training_minutes": {"tower": {"clock": 3.0, "processor": 2.0}}}
    assert weights.made_by(None) == {}
    chosen = argparse.Namespace(out=None, weights=export)
    assert weights.target("mini-qwen2.5-vl", chosen).name == "mini_qwen2_5_vl_again.json"
    (export / "sha256").write_text("0" * 64)
    with pytest.raises(ValueError, match="are damaged"):
        weights.load("mini-llava", export)

    for name, accuracy, more in (("mini_a", 0.9, {}), ("mini_a_again", 0.95, weights.made_by(export))):
        one = {"mean": accuracy, "by_kind": {"exist": accuracy, "count": accuracy}}
        conditions = {"unpruned": one, "blind": one}
        (tmp_path / f"{name}.json").write_text(json.dumps({"model": "a", "conditions": conditions, **more}))
    text = tables.again(tmp_path)
    assert "| `a` | unpruned | shipped |  | **90.0** | exist 90, count 90 |" in text
    assert "| `a` | blind | again | 2 | **95.0** | exist 95, count 95 |" in text
    assert tables.embedded(tmp_path).count("unpruned") == 1


@pytest.fixture
def runs():
    """80 questions on 40 pictures: `dart` knows all, `fastv` half of the pictures, `random` none."""
    from finished import made_up_run

    def run(reducer, right, task="t"):
        tokens = {"visual_tokens": 100, "visual_per_layer": 10, "evidence_recall": 0.5}
        samples = [
            {"doc_id": i, "cluster": str(i // 2), "score": float(i // 2 < right), "answer": "a", "tokens": tokens}
            for i in range(80)
        ]
        return made_up_run(reducer, samples, task=task, keep=0.1)

    return {("m", name, 0.1): [run(name, right)] for name, right in (("random", 0), ("fastv", 20), ("dart", 40))}, run


def test_the_comparison_says_which_claims_show(script, runs, monkeypatch):
    groups, _ = runs
    monkeypatch.syspath_prepend(FOLDER)
    module, tables = script("minis"), script("minis_tables")
    from collections import defaultdict

    rows = {row["reducer"]: row for row in module.summary(groups)}
    assert rows["fastv"]["versus_random"]["value"] == 0.5
    assert rows["fastv"]["versus_random"]["adjusted"] < 0.05
    assert "versus_random" not in rows["random"]
    new = {"rows": list(rows.values()), "claims": module.claims(defaultdict(list, groups)), "made_with": {"m": {}}}
    found = module.merged(new, {})["claims"]
    assert [(claim["new"], claim["old"], claim["value"]) for claim in found] == [("dart", "fastv", 0.5)]
    assert "| `dart` over `fastv` | +50.0* |" in tables.claims(found)
    assert "| `fastv` | 50.0 + | 50 % | 10 % |" in tables.matrix(list(rows.values()), "m")


def test_one_model_is_replaced_and_all_claims_are_corrected_again(script, tmp_path):
    module = script("minis")
    path = module.sweep_of("minis", ["mini-qwen2.5-vl"], tmp_path)
    settings, whole = (yaml.safe_load(Path(p).read_text()) for p in (path, FOLDER.parent / "configs/sweeps/minis.yaml"))
    assert settings == {**whole, "models": ["mini-qwen2.5-vl"]}
    assert module.sweep_of("minis-next", ["mini-qwen2.5-vl"], tmp_path) is None
    assert module.sweep_of("minis", [], tmp_path) == "minis"

    def report(model, p, value):
        claim = {"model": model, "p_value": p, "adjusted": 9.0}
        row = {"model": model, "reducer": "fopru", "keep": 0.1, "accuracy": {"value": 0.5}, "value": value}
        return {"rows": [row], "claims": [claim], "made_with": {model: {"torch": value}}}

    old = module.merged(report("b", 0.02, "old"), report("a", 0.01, "old"))
    found = module.merged(report("a", 0.03, "new"), old)
    assert [(row["model"], row["value"]) for row in found["rows"]] == [("a", "new"), ("b", "old")]
    assert [claim["adjusted"] for claim in found["claims"]] == pytest.approx([0.04, 0.04])
    assert found["made_with"] == {"a": {"torch": "new"}, "b": {"torch": "old"}}


def test_new_reducers_come_to_the_rows_that_are_there(script, tmp_path):
    module = script("minis")
    settings = yaml.safe_load(Path(module.sweep_of("minis", [], tmp_path, ["mmtok"])).read_text())
    assert settings["reducers"] == ["random", "mmtok"]
    assert module.sweep_of("minis", [], tmp_path, ["none_such"]) is None

    def row(reducer, accuracy=0.5, p=0.03):
        versus = {} if reducer == "random" else {"versus_random": {"p_value": p}}
        return {"model": "a", "reducer": reducer, "keep": 0.1, "accuracy": {"value": accuracy}, **versus}

    old = {"rows": [row("random"), row("fopru")], "claims": [], "made_with": {"a": {"torch": "old"}}}
    new = {"rows": [row("random"), row("mmtok")], "claims": [], "made_with": {"a": {"torch": "new"}}}
    found = module.merged(new, old, ["mmtok"])
    assert [one["reducer"] for one in found["rows"]] == ["random", "fopru", "mmtok"]
    assert [one["versus_random"]["adjusted"] for one in found["rows"][1:]] == pytest.approx([0.06, 0.06])
    assert found["made_with"] == old["made_with"]
    with pytest.raises(SystemExit, match="answers otherwise"):
        module.merged({**new, "rows": [row("random", 0.4), row("mmtok")]}, old, ["mmtok"])


def test_cells_of_two_versions_are_not_pooled(script, runs, monkeypatch):
    _, run = runs
    monkeypatch.syspath_prepend(FOLDER)
    module = script("minis")
    monkeypatch.setattr(module, "read_runs", lambda folder: [run("dart", 40), run("dart", 20)])
    with pytest.raises(SystemExit, match=r"\('m', 'dart', 0.1\) was run by several versions"):
        module.read([FOLDER])


def test_a_projector_that_begins_with_a_norm_is_most_sensitive_to_small_inputs(script, tmp_path):
    out = tmp_path / "sensitivity.json"
    script("sensitivity", "--quick", "--out", str(out)).main()
    found = json.loads(out.read_text())["results"]
    assert found["mini-internvl"]["most"] < -0.5 < found["mini-llava-next"]["least"]


def test_starts_are_measured_in_turn_and_called_noisy(script, tmp_path, capsys, monkeypatch):
    out = tmp_path / "startup.json"
    module = script("startup", "--quick", "--rounds", "2", "--out", str(out))
    module.main()
    found = json.loads(out.read_text())["results"]["seconds"]
    assert list(found) == ["vtoken"]
    assert found["vtoken"]["wall"]["median"] > 0
    assert capsys.readouterr().out.startswith("vtoken")
    seconds = iter([1, 1, 1, 1, 2, 1.5, 2, 2.4, 3, 2.1, 2, 3.5])  # three a round
    monkeypatch.setattr(module, "run", lambda command: (next(seconds), 0.5))
    found = module.measure({module.BASE: [], module.AGAIN: [], "vtoken": []}, 3)
    assert found["added"]["vtoken"] == {"wall": pytest.approx(1.0), "cpu": 0.0}
    assert found["added"][module.AGAIN]["wall"] == pytest.approx(0.4)
    assert found["noisy"] == [module.BASE, "vtoken", "added"]
