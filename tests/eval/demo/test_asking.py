# SPDX-License-Identifier: Apache-2.0
"""What the demo's button does, without a browser and without Gradio's server."""

import pytest
import torch
from PIL import Image

import vtoken
from vtoken import mini
from vtoken.eval.demo.asking import EXAMPLES, Asking, examples, summary
from vtoken.mini.documents import held_out


@pytest.fixture(scope="module")
def asking():
    return Asking("mini-llava", *mini.load("mini-llava"), max_new_tokens=8)


@pytest.fixture(scope="module")
def document():
    return held_out("attr", 1)[0]


@pytest.fixture(scope="module")
def picture(document):
    return Image.fromarray(document.images[0])


def by_hand(asking, picture, question):
    """The answer of the model as it is now, without any code of the demo."""
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    inputs = asking.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        out = asking.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return asking.processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_both_answers_are_those_of_the_model(asking, picture, document):
    found = asking.compare(picture, f"  {document.question} ", "fastv", 0.1)
    assert found.unpruned.text == by_hand(asking, picture, document.question) != ""
    with vtoken.reduce(asking.model, "fastv", keep=0.1):
        assert found.pruned.answer == by_hand(asking, picture, document.question)
        stats = vtoken.stats(asking.model)
    assert (found.pruned.tokens, found.pruned.kept, found.pruned.last) == (144, 144, 14)
    assert found.pruned.layers == (144,) * 3 + (14,) * (stats.depth - 3)  # FastV drops before layer 3
    for answer in (found.unpruned, found.pruned):
        assert 0 < answer.first <= answer.whole
    with pytest.raises(ValueError, match="not wrapped"):
        vtoken.stats(asking.model)


def test_a_reducer_without_a_keep_ratio_is_not_told_one(asking, picture):
    assert "no keep ratio" in summary("vtw")
    assert "no keep ratio" not in summary("idpruner")
    shown = asking.compare(picture, "what is it ?", "vtw", 0.5).pruned
    assert (shown.kept, shown.last) == (144, 0)
    assert shown.layers[0] == 144
    assert shown.layers[-1] == 0


def test_a_reducer_that_the_model_refuses_says_why_beside_the_unpruned_answer(picture, document):
    found = Asking("qwen", *mini.load("mini-qwen2.5-vl"), 8).compare(picture, document.question, "globalcom2", 0.5)
    assert found.unpruned.text
    assert found.pruned.picture is None
    assert "[CLS]" in found.pruned.why


def test_the_examples_are_of_the_embedded_world(tmp_path):
    offered = examples(tmp_path)
    assert [Image.open(path).size for path, _ in offered] == [
        held_out(task, 1)[0].images[0].shape[1::-1] for task in EXAMPLES
    ]
    assert [question for _, question in offered] == [held_out(task, 1)[0].question for task in EXAMPLES]


@pytest.mark.parametrize(
    ("there", "question", "reducer", "keep", "sentence"),
    [
        (False, "what ?", "random", 0.5, "There is no picture: upload one, or pick an example."),
        (True, "  ", "random", 0.5, "There is no question: write"),
        (True, "what ?", "fopro", 0.5, "did you mean 'fopru'"),
        (True, "what ?", "random", 1.5, "not a ratio"),
        (True, "word " * 5000, "random", 0.5, "ask a shorter question"),
    ],
)
def test_wrong_input_is_a_sentence(asking, picture, there, question, reducer, keep, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        asking.compare(picture if there else None, question, reducer, keep)
    assert "\n" not in str(refused.value)


def test_no_file_can_be_named_for_a_reducer(asking, picture, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("reducer: random")
    assert vtoken.get_reducer(str(file)).name == "random"  # it would be read
    with pytest.raises(ValueError, match="Unknown reducer"):
        asking.compare(picture, "what ?", str(file), 0.5)
