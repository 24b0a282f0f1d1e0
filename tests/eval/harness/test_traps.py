# SPDX-License-Identifier: Apache-2.0
"""What goes silently wrong when lmms-eval 0.7.3 drives a sweep, and that it does not here.

Other traps have their tests where the code is: exit codes (`test_plugin`, `tests/cli`), cache keys without the reducer,
cleaning of the model, swallowed exceptions (`test_model`), crash safety (`test_samplelog`, `test_runner`), score shapes
and failed requests (`test_scores`), reasoning tags, double decoding, log sinks (`test_harness`), the wrappers' own
preprocessing (`test_preprocessing`).
"""

import json

import pytest

from vtoken.eval.harness import driver
from vtoken.eval.harness.tasksource import load_task, resolve_tasks
from vtoken.eval.model.loaded import LoadedModel
from vtoken.eval.model.loading import ModelSpec, model_type, weights_id
from vtoken.eval.running.runner import Runner
from vtoken.eval.store.record import RESULT, SAMPLES
from vtoken.eval.store.results import Store
from vtoken.eval.sweeps.cells import Cell
from vtoken.eval.sweeps.sweep import Sweep

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: data.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.picture
doc_to_text: !function utils.prompt
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 4, do_sample: {sampled}, temperature: {sampled}}}
process_results: !function utils.score
metric_list:
  - {{metric: score, aggregation: !function utils.aggregate, higher_is_better: true}}
  - {{metric: other, aggregation: !function utils.aggregate, higher_is_better: true}}
lmms_eval_specific_kwargs:
  default: {{post: " for anyone"}}
  qwen3_vl: {{post: " for qwen"}}
"""
UTILS = """
from pathlib import Path
from PIL import Image
from lmms_eval.tasks._task_utils.file_utils import generate_submission_file

def picture(doc):
    return [Image.new("RGB", (168, 168), (doc["id"] * 7 % 256, 90, 120))]

def prompt(doc, lmms_eval_specific_kwargs=None):
    return doc["question"] + lmms_eval_specific_kwargs["post"]

def score(doc, results):
    name = "score" if doc["id"] % 2 else "other"
    return {name: {"id": doc["id"], "score": float(results[0] == doc["answer"])}}

def aggregate(results, args):
    Path(generate_submission_file("answers.txt", args)).write_text(str(len(results)))
    return sum(result["score"] for result in results) / len(results)
"""


@pytest.fixture
def folder(tmp_path):
    """Two tasks with scoring code of their own, which writes submission files: one greedy, one that samples."""
    root = tmp_path / "tasks"
    root.mkdir()
    docs = [{"id": i, "question": f"what is the digit {i} ?", "answer": str(i)} for i in range(12)]
    (root / "data.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (root / "utils.py").write_text(UTILS)
    (root / "greedy.yaml").write_text(TASK.format(name="own_greedy", sampled="false"))
    (root / "sampled.yaml").write_text(TASK.format(name="own_sampled", sampled="true"))
    return root


@pytest.fixture
def cells(folder, checkpoint):
    """``cells(limit=6)``: a cell of each task on the unpruned untrained model."""
    spec = ModelSpec(str(checkpoint), device="cpu")

    def make(limit=6, seed=0):
        return {
            ref.name: Cell(spec, weights_id(spec), model_type(spec), None, ref, limit, seed, 4)
            for ref in resolve_tasks([str(folder)])
        }

    return make


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "results")


def run(store, *cells):
    outcome = Runner(store, empty_limit=1.0).run(cells)
    assert not outcome.failed
    return [store.result(cell.id) for cell in cells]


def test_submission_files_of_two_cells_do_not_overwrite_each_other(cells, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    few, many = cells(limit=4)["own_greedy"], cells(limit=6)["own_greedy"]
    run(store, few, many)
    found = {path.read_text(): path for path in store.root.rglob("answers.txt")}
    assert set(found) == {"2", "3"}  # each metric has half of the documents
    assert few.id in str(found["2"])
    assert many.id in str(found["3"])
    assert set(tmp_path.iterdir()) == before


def test_samples_of_a_second_run_replace_those_of_the_first(cells, store):
    cell = cells()["own_greedy"]
    run(store, cell)
    store.path(cell.id, RESULT).unlink()
    run(store, cell)
    assert len(store.path(cell.id, SAMPLES).read_text().splitlines()) == 6


@pytest.mark.parametrize("limit", [0.25, 0, "0.5"])
def test_fractional_limits_are_refused(limit):
    """lmms-eval would apply the first task's number to all tasks."""
    with pytest.raises(ValueError, match="limit"):
        Sweep(models=["mini-llava"], tasks=["mini"], reducers=["random"], keep=[0.5], limit=limit)


def test_every_document_has_a_fingerprint_of_its_own(cells, store, monkeypatch):
    """lmms-eval's own ``doc_hash`` is the same for all of them."""
    seen = []
    original = driver.evaluate
    monkeypatch.setattr(
        "vtoken.eval.running.runner.evaluate", lambda *a, **k: seen.append(original(*a, **k)) or seen[-1]
    )
    cell = cells()["own_greedy"]
    run(store, cell)
    assert len({sample["doc_hash"] for sample in seen[0].samples}) == 1
    samples = store.samples(cell.id)
    assert len({sample["prompt"] for sample in samples}) == len(samples) == 6


@pytest.mark.parametrize(("family", "post"), [("qwen3_vl", " for qwen"), ("llava", " for anyone")])
def test_prompts_are_those_of_the_stock_model_of_the_family(folder, family, post):
    task = load_task("own_greedy", family, str(folder))
    assert task.doc_to_text(task.eval_docs[0]) == f"what is the digit 0 ?{post}"


def test_the_caches_of_lmms_eval_are_never_on(cells, store, monkeypatch):
    """They answer for another reducer, lose token counts, and break for chat models."""
    calls = []
    evaluator = driver.load_harness()
    original = evaluator.simple_evaluate
    monkeypatch.setattr(evaluator, "simple_evaluate", lambda **call: calls.append(call) or original(**call))
    run(store, cells()["own_greedy"])
    assert not any(
        call.get(name) for call in calls for name in ("use_cache", "cache_requests", "delete_requests_cache")
    )
    assert calls[0]["cli_args"].process_with_media is False


def test_a_document_may_have_only_one_of_the_metrics(cells, store):
    """MME logs perception or cognition, never both: a score that one document lacks is not missing."""
    cell = cells()["own_greedy"]
    (result,) = run(store, cell)
    assert result.documents == 6
    assert {sample["score"] for sample in store.samples(cell.id)} <= {0.0, 1.0}


def test_one_unreachable_dataset_does_not_take_the_others_with_it(cells, store, folder):
    good, bad = cells()["own_greedy"], cells()["own_sampled"]
    text = (folder / "sampled.yaml").read_text()
    (folder / "sampled.yaml").write_text(text.replace("data.jsonl", "gone.jsonl"))
    outcome = Runner(store, empty_limit=1.0).run([bad, good])
    assert [outcome.failed, outcome.finished] == [[bad], [good]]
    assert "gone.jsonl" in store.failure(bad.id).error


def test_sampled_answers_depend_on_the_cells_seed_alone(cells, store, tmp_path):
    def answers(where, cell):
        run(where, cell)
        return [sample["answer"] for sample in where.samples(cell.id)]

    first = answers(store, cells(seed=1)["own_sampled"])
    assert answers(Store(tmp_path / "again"), cells(seed=1)["own_sampled"]) == first
    assert answers(store, cells(seed=2)["own_sampled"]) != first


def test_sampled_answers_do_not_depend_on_where_a_run_was_interrupted(cells, store, tmp_path, monkeypatch):
    cell = cells(limit=12)["own_sampled"]
    run(store, cell)
    whole = [sample["answer"] for sample in store.samples(cell.id)]

    original, calls = LoadedModel.generate, []

    def dies(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(LoadedModel, "generate", dies)
    halfway = Store(tmp_path / "halfway")
    with pytest.raises(KeyboardInterrupt):
        Runner(halfway, empty_limit=1.0).run([cell])
    run(halfway, cell)
    assert [sample["answer"] for sample in halfway.samples(cell.id)] == whole
