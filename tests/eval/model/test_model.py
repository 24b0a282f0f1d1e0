# SPDX-License-Identifier: Apache-2.0
"""The lmms-eval model: batches, counts, logging, and failures that stay failures."""

from types import SimpleNamespace

import pytest

import vtoken
from vtoken.eval.errors import EvalError
from vtoken.eval.harness.driver import load_harness
from vtoken.eval.harness.tasksource import load_task
from vtoken.eval.model.loading import ModelSpec
from vtoken.eval.store.samplelog import SampleLog


@pytest.fixture(scope="module")
def model(checkpoint):
    load_harness()
    from vtoken.eval.model.reduced import ReducedModel

    return ReducedModel(ModelSpec(str(checkpoint), device="cpu"), batch_size=4)


@pytest.fixture(autouse=True)
def _fresh(request):
    """Each test gets the model unpruned and without a log."""
    yield
    if "model" in request.fixturenames:
        shared = request.getfixturevalue("model")
        shared.use(None)
        shared.log, shared.batch_size = None, 4


@pytest.fixture
def requests_of(model, private_cache):
    """``requests_of(6)``: the first documents of a task, as lmms-eval asks them."""

    def make(number, name="mini", **arguments):
        task = load_task(name)
        model.task_dict[name] = task.dataset
        kwargs = {"max_new_tokens": 4, "temperature": 0, "do_sample": False, **arguments}
        return [
            SimpleNamespace(args=("ctx", task.doc_to_messages, dict(kwargs), i, name, "test")) for i in range(number)
        ]

    return make


def texts(results):
    return [result.text for result in results]


@pytest.mark.parametrize("reducer", [None, "fopru", "todre"])
def test_batches_answer_as_single_questions_do(model, requests_of, reducer):
    model.use(vtoken.get_reducer(reducer, keep=0.25) if reducer else None)
    together = texts(model.generate_until(requests_of(7)))
    model.batch_size = 1
    assert texts(model.generate_until(requests_of(7))) == together
    assert len(set(together)) > 1


def test_counts_visual_tokens_of_every_sample(model, requests_of):
    counts = [result.token_counts.to_dict() for result in model.generate_until(requests_of(5))]
    assert all((c["visual_tokens"], c["visual_kept"], c["visual_per_layer"]) == (144, 144, 144.0) for c in counts)
    model.use(vtoken.get_reducer("random", keep=0.25))
    counts = [result.token_counts.to_dict() for result in model.generate_until(requests_of(5))]
    assert all((c["visual_tokens"], c["visual_kept"], c["visual_per_layer"]) == (144, 36, 36.0) for c in counts)
    assert all(c["input_tokens"] > 144 and 1 <= c["output_tokens"] <= 4 for c in counts)


def test_counts_tokens_per_layer_of_a_method_that_drops_inside(model, requests_of):
    model.use(vtoken.get_reducer("todre", keep=0.5, tau=1.0))
    counts = [result.token_counts.to_dict() for result in model.generate_until(requests_of(3))]
    assert all(c["visual_kept"] == 72 and c["visual_per_layer"] < 72 for c in counts)


def test_counts_of_beams(model, requests_of):
    model.use(vtoken.get_reducer("random", keep=0.25))
    counts = [result.token_counts.to_dict() for result in model.generate_until(requests_of(3, num_beams=2))]
    assert [c["visual_kept"] for c in counts] == [36, 36, 36]


def test_keeps_the_order_where_generation_arguments_differ(model, requests_of):
    short, long = requests_of(4, max_new_tokens=1), requests_of(4, max_new_tokens=6)
    mixed = [short[0], long[1], short[2], long[3]]
    assert texts(model.generate_until(mixed)) == [texts(model.generate_until([request]))[0] for request in mixed]


def test_stop_strings_cut_the_answer(model, requests_of):
    whole = texts(model.generate_until(requests_of(4, max_new_tokens=8)))
    assert any(" " in text for text in whole)
    assert texts(model.generate_until(requests_of(4, max_new_tokens=8, until=[" "]))) == [
        t.split(" ")[0] for t in whole
    ]


def test_the_cache_key_of_lmms_eval_names_the_reducer(model):
    names = [str(model)]
    for keep in (0.5, 0.25):
        model.use(vtoken.get_reducer("fopru", keep=keep))
        names.append(str(model))
    assert len(set(names)) == 3


def test_survives_the_cleaning_of_lmms_eval(model, requests_of):
    model.clean()
    assert len(model.generate_until(requests_of(2))) == 2


def test_a_failing_reducer_raises(model, requests_of, monkeypatch):
    model.use(vtoken.get_reducer("random", keep=0.25))

    def crash(self, ctx):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(type(model.reducer), "before_llm", crash)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        model.generate_until(requests_of(2))


def test_logged_answers_are_not_generated_again(model, requests_of, tmp_path, monkeypatch):
    asked = []
    original = model.answer
    monkeypatch.setattr(model, "answer", lambda talks, *rest: asked.append(len(talks)) or original(talks, *rest))
    with SampleLog(tmp_path / "log") as model.log:
        first = model.generate_until(requests_of(8))
    with SampleLog(tmp_path / "log") as model.log:
        assert model.generate_until(requests_of(8)) == first
        model.generate_until(requests_of(8, max_new_tokens=5))  # another question
    assert asked == [4, 4, 4, 4]


def test_a_batch_that_was_torn_is_answered_as_a_whole(model, requests_of, tmp_path, monkeypatch):
    """Its answers must not depend on where the former run died."""
    with SampleLog(tmp_path / "log") as model.log:
        first = model.generate_until(requests_of(8))
    lines = (tmp_path / "log").read_bytes().splitlines(keepends=True)
    (tmp_path / "log").write_bytes(b"".join(lines[:6]) + lines[6][:10])
    asked = []
    original = model.answer
    monkeypatch.setattr(model, "answer", lambda talks, *rest: asked.append(len(talks)) or original(talks, *rest))
    with SampleLog(tmp_path / "log") as model.log:
        assert model.generate_until(requests_of(8)) == first
    assert asked == [4]


def test_other_requests_are_refused(model):
    with pytest.raises(NotImplementedError, match="generation only"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="single questions"):
        model.generate_until_multi_round([])


def test_text_only_prompts_count_no_visual_tokens(model):
    model.use(vtoken.get_reducer("random", keep=0.25))
    talk = [{"role": "user", "content": [{"type": "text", "text": "what is the digit ?"}]}]
    counts = model.answer([talk], {"max_new_tokens": 2})[0]["counts"]
    assert (counts["visual_tokens"], counts["visual_kept"]) == (0, 0)


def test_a_video_that_the_chat_template_leaves_out_is_refused(model, requests_of):
    """The embedded LLaVA takes pictures only: it would answer as if it had been shown nothing."""
    with pytest.raises(EvalError, match=r"made no visual token of the video .* choose other tasks"):
        model.generate_until(requests_of(2, "mini_video"))
