# SPDX-License-Identifier: Apache-2.0
"""The lmms-eval model: batches, counts, logging, and failures that stay failures."""

from types import SimpleNamespace

import pytest

import vtoken
from vtoken.eval.errors import EvalError
from vtoken.eval.harness.driver import load_harness
from vtoken.eval.harness.tasksource import load_task
from vtoken.eval.model.loaded import LoadedModel
from vtoken.eval.model.loading import ModelSpec
from vtoken.eval.store.samplelog import SampleLog
from vtoken.wrapping import session_of


@pytest.fixture(scope="module")
def model(checkpoint):
    return LoadedModel(ModelSpec(str(checkpoint), device="cpu"))


@pytest.fixture
def ask(model, questions_of):
    """``ask(6, reducer, max_new_tokens=2)``: answers to the first documents of a task, four at a time."""

    def ask(number, reducer=None, *, batch_size=4, log=None, **arguments):
        return model.answer(questions_of(number, **arguments), reducer, log, batch_size=batch_size)

    return ask


@pytest.fixture
def questions_of(private_cache):
    """``questions_of(6)``: the first documents of a task, as lmms-eval asks them."""
    load_harness()
    from vtoken.eval.harness.asked import question_of

    def make(number, name="mini", **arguments):
        task = load_task(name)
        kwargs = {"max_new_tokens": 4, "temperature": 0, "do_sample": False, **arguments}
        requests = [("ctx", task.doc_to_messages, dict(kwargs), i, name, "test") for i in range(number)]
        return [question_of(SimpleNamespace(args=request), {name: task.dataset}) for request in requests]

    return make


def texts(answers):
    return [answer.text for answer in answers]


def random(keep=0.25):
    return vtoken.get_reducer("random", keep=keep)


@pytest.mark.parametrize("reducer", [None, "fopru", "todre"])
def test_batches_answer_as_single_questions_do(ask, reducer):
    reducer = vtoken.get_reducer(reducer, keep=0.25) if reducer else None
    together = texts(ask(7, reducer))
    assert texts(ask(7, reducer, batch_size=1)) == together
    assert len(set(together)) > 1


def test_nothing_of_a_call_is_left_for_the_next(model, ask, monkeypatch):
    first = ask(4)
    ask(4, random())
    assert session_of(model.model) is None
    with monkeypatch.context() as patch:
        patch.setattr(vtoken.Random, "before_llm", crash)
        with pytest.raises(RuntimeError, match="shapes do not match"):
            ask(2, random())
    assert session_of(model.model) is None
    assert ask(4) == first


def crash(self, ctx):
    raise RuntimeError("shapes do not match")


def test_counts_visual_tokens_of_every_sample(ask):
    for reducer, kept in ((None, 144), (random(), 36)):
        counts = [answer.counts for answer in ask(5, reducer)]
        assert all((c["visual_tokens"], c["visual_kept"], c["visual_per_layer"]) == (144, kept, kept) for c in counts)
        assert all(c["input_tokens"] > 144 and 1 <= c["output_tokens"] <= 4 for c in counts)


def test_counts_tokens_per_layer_of_a_method_that_drops_inside(ask):
    counts = [answer.counts for answer in ask(3, vtoken.get_reducer("todre", keep=0.5, tau=1.0))]
    assert all(c["visual_kept"] == 72 and c["visual_per_layer"] < 72 for c in counts)


def test_counts_of_beams(ask):
    assert [answer.counts["visual_kept"] for answer in ask(3, random(), num_beams=2)] == [36, 36, 36]


def test_every_answer_names_its_question_and_picture(ask):
    answers = ask(6)
    assert len({answer.prompt for answer in answers}) == 6
    assert all(answer.picture for answer in answers)
    assert not {"prompt", "picture"} & set(answers[0].counts)


def test_keeps_the_order_where_generation_arguments_differ(model, questions_of):
    short, long = questions_of(4, max_new_tokens=1), questions_of(4, max_new_tokens=6)
    mixed = [short[0], long[1], short[2], long[3]]
    assert texts(model.answer(mixed, batch_size=4)) == [model.answer([one])[0].text for one in mixed]


def test_stop_strings_cut_the_answer(ask):
    whole = texts(ask(4, max_new_tokens=8))
    assert any(" " in text for text in whole)
    assert texts(ask(4, max_new_tokens=8, until=[" "])) == [text.split(" ")[0] for text in whole]


def reduced(model, reducer=None):
    from vtoken.eval.model.reduced import ReducedModel

    return ReducedModel(model, reducer, batch_size=4)


def test_the_cache_key_of_lmms_eval_names_the_reducer(model, questions_of):
    assert len({str(reduced(model, reducer)) for reducer in (None, random(0.5), random(0.25))}) == 3


def test_lmms_eval_gets_texts_and_counts_and_no_hashes(model, questions_of):
    asked = reduced(model, random())
    task = load_task("mini")
    asked.task_dict["mini"] = task.dataset
    requests = [
        SimpleNamespace(args=("", task.doc_to_messages, {"max_new_tokens": 2}, i, "mini", "test")) for i in (0, 1)
    ]
    asked.clean()  # lmms-eval would delete the model
    results = asked.generate_until(requests)
    assert [result.text for result in results] == [asked.answers[i].text for i in (0, 1)]
    counts = results[0].token_counts.to_dict()
    assert counts["visual_kept"] == 36
    assert all(isinstance(value, (int, float)) for value in counts.values())


def test_logged_answers_are_not_generated_again(model, ask, tmp_path, monkeypatch):
    asked = spy(model, monkeypatch)
    with SampleLog(tmp_path / "log") as log:
        first = ask(8, log=log)
    with SampleLog(tmp_path / "log") as log:
        assert ask(8, log=log) == first
        ask(8, log=log, max_new_tokens=5)  # another question
    assert asked == [4, 4, 4, 4]


def spy(model, monkeypatch):
    """The sizes of all batches that are generated from here on."""
    asked, original = [], model.generate
    monkeypatch.setattr(model, "generate", lambda talks, *rest: asked.append(len(talks)) or original(talks, *rest))
    return asked


def test_a_batch_that_was_torn_is_answered_as_a_whole(model, ask, tmp_path, monkeypatch):
    """Its answers must not depend on where the former run died."""
    with SampleLog(tmp_path / "log") as log:
        first = ask(8, log=log)
    lines = (tmp_path / "log").read_bytes().splitlines(keepends=True)
    (tmp_path / "log").write_bytes(b"".join(lines[:6]) + lines[6][:10])
    asked = spy(model, monkeypatch)
    with SampleLog(tmp_path / "log") as log:
        assert ask(8, log=log) == first
    assert asked == [4]


def test_other_requests_are_refused(model):
    with pytest.raises(NotImplementedError, match="generation only"):
        reduced(model).loglikelihood([])
    with pytest.raises(NotImplementedError, match="single questions"):
        reduced(model).generate_until_multi_round([])


def test_text_only_prompts_count_no_visual_tokens(model):
    talk = [{"role": "user", "content": [{"type": "text", "text": "what is the digit ?"}]}]
    with model.under(random()):
        ((_, counts),) = model.generate([talk], {"max_new_tokens": 2}, random())
    assert (counts["visual_tokens"], counts["visual_kept"]) == (0, 0)


def test_a_video_that_the_chat_template_leaves_out_is_refused(model, questions_of):
    """The embedded LLaVA takes pictures only: it would answer as if it had been shown nothing."""
    with pytest.raises(EvalError, match=r"made no visual token of the video .* choose other tasks"):
        model.answer(questions_of(2, "mini_video"))
