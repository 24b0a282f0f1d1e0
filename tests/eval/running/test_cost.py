# SPDX-License-Identifier: Apache-2.0
"""Measured cost: plausible, complete, and apart from the accuracy run."""

import pytest
import torch

import vtoken
from vtoken.eval.running.cost import first_inputs, measure_cells
from vtoken.eval.running.runner import Runner
from vtoken.eval.store.results import Store
from vtoken.profile import measure_prefill


@pytest.fixture(scope="module")
def loaded():
    return {}


@pytest.fixture
def runner(tmp_path, loaded):
    runner = Runner(Store(tmp_path))
    runner._loaded = loaded.get("model")
    yield runner
    loaded["model"] = runner._loaded


def hooks(model, inputs):
    """How many hooks each module has; transformers adds its own at the first forward pass."""
    with torch.inference_mode():
        model.model(**inputs)
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.model.modules()]


def test_fewer_tokens_hold_less_and_cost_less(runner, make_cell):
    cell = make_cell("random", keep=0.05)
    model = runner.model(cell)
    inputs = first_inputs(cell, model, 4)
    before = hooks(model, inputs)
    cost = measure_prefill(model.model, cell.reducer, inputs, pairs=3)
    assert cost.batch_size == 4
    assert cost.speedup > 1.3
    text = cost.unpruned_kv_bytes / 144 * 137  # 7 of 144 visual tokens stay
    assert cost.kv_bytes < cost.unpruned_kv_bytes - 0.8 * text
    assert cost.vision_ms > 0
    assert hooks(model, inputs) == before


def test_the_cache_holds_exactly_what_is_kept(runner, make_cell):
    cell = make_cell("random", keep=0.25)
    model = runner.model(cell)
    inputs = first_inputs(cell, model, 1)
    cost = measure_prefill(model.model, cell.reducer, inputs, pairs=1, warmup=0)
    config = model.model.config.text_config
    per_token = 2 * 4 * config.num_hidden_layers * config.hidden_size
    text = inputs["input_ids"].shape[1] - 144
    assert (cost.unpruned_kv_bytes, cost.kv_bytes) == ((text + 144) * per_token, (text + 36) * per_token)


def test_without_a_reducer_nothing_is_compared(runner, make_cell):
    cell = make_cell()
    model = runner.model(cell)
    cost = measure_prefill(model.model, None, first_inputs(cell, model, 2), pairs=2)
    assert (cost.speedup, cost.kv_bytes, cost.prefill_ms) == (1.0, cost.unpruned_kv_bytes, cost.unpruned_ms)


def test_a_failing_reducer_leaves_no_hook_behind(runner, make_cell, monkeypatch):
    cell = make_cell("random", keep=0.25)
    model = runner.model(cell)
    inputs = first_inputs(cell, model, 1)
    before = hooks(model, inputs)
    monkeypatch.setattr(vtoken.Random, "before_llm", lambda self, ctx: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure_prefill(model.model, cell.reducer, inputs)
    assert hooks(model, inputs) == before


def test_a_cell_that_cannot_be_measured_keeps_its_accuracy(runner, make_cell, monkeypatch):
    cells = [make_cell("random", keep=0.25), make_cell("uniform", keep=0.25)]
    runner.run(cells)
    monkeypatch.setattr(vtoken.Random, "select", lambda self, ctx, budget: 1 / 0)
    assert measure_cells(cells, runner) == {cells[0]: "division by zero"}
    assert runner.store.profile(cells[0].id) is None
    assert runner.store.profile(cells[1].id) is not None
    assert runner.store.result(cells[0].id) is not None


def test_only_finished_cells_are_measured_and_only_once(runner, make_cell):
    cells = [make_cell("random", keep=0.25), make_cell("random", keep=0.5)]
    runner.run(cells[:1])
    measured = []
    measure_cells(cells, runner, before=measured.append)
    measure_cells(cells, runner, before=measured.append)
    assert measured == cells[:1]
    assert runner.store.profile(cells[0].id)["kv_bytes"] > 0
    assert torch.is_grad_enabled()
