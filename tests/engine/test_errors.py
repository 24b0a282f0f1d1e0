# SPDX-License-Identifier: Apache-2.0
"""Bad input raises one sentence that names the value and the way out."""

from __future__ import annotations

import pickle
import threading

import pytest
import tiny
import torch
from oracles import GREEDY, PLANS, generate
from transformers import StaticCache

import vtoken


@pytest.fixture
def model_and_inputs():
    return tiny.make("llava", (1,))


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (0, "keep=0 would leave no token"),
        (-1, "keep=-1 would leave no token"),
        (9.0, "keep=9"),
        (0.0, "not a ratio"),
        (1.5, "not a ratio"),
        (float("nan"), "not a ratio"),
        ("abc", "'abc' is not a number"),
        (None, "not a number"),
        (True, "not a number"),
    ],
)
def test_keep_out_of_range(model_and_inputs, keep, words):
    with pytest.raises(ValueError, match=words):
        vtoken.wrap(model_and_inputs[0], "random", keep=keep)


def test_an_int_is_a_token_count(model_and_inputs):
    model, inputs = model_and_inputs
    with vtoken.reduce(model, "random", keep=9), torch.no_grad():
        model(**inputs)
        assert vtoken.stats(model).tokens_kept == 9


def test_unknown_names():
    with pytest.raises(ValueError, match="did you mean 'fopru'"):
        vtoken.get_reducer("forpu")
    with pytest.raises(ValueError, match=r"Unknown parameter 'kep' .* did you mean 'keep'"):
        vtoken.get_reducer("fopru", kep=0.5)
    with pytest.raises(ValueError, match="needs the key 'reducer'"):
        vtoken.get_reducer({"name": "fopru"})


def test_wrap_twice_and_unwrap_unwrapped(model_and_inputs):
    model, _ = model_and_inputs
    with pytest.raises(ValueError, match="not wrapped"):
        vtoken.unwrap(model)
    with pytest.raises(ValueError, match="not wrapped"):
        vtoken.stats(model)
    vtoken.wrap(model, "random", keep=0.5)
    with pytest.raises(ValueError, match=r"wrapped already, with random,keep=0\.5"):
        vtoken.wrap(model, "fopru", keep=0.5)
    with pytest.raises(ValueError, match="No prompt with an image"):
        vtoken.stats(model)
    vtoken.unwrap(model)


def test_a_model_that_no_adapter_knows():
    with pytest.raises(TypeError, match="No adapter knows the model Linear: supported are"):
        vtoken.wrap(torch.nn.Linear(2, 2), "random")
    with pytest.raises(TypeError, match="'llava' is no model: load one first"):
        vtoken.wrap("llava", "random")
    with pytest.raises(TypeError, match="None is no model: load one first"):
        vtoken.unwrap(None)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("language_model", "has no language model"),
        ("language_model.layers", "has no decoder layers"),
        ("tower", "has no vision tower"),
    ],
)
@pytest.mark.parametrize("family", tiny.CORE)
def test_a_model_that_was_loaded_in_part(family, part, words):
    model, _ = tiny.make(family, (1,))
    holder = model.model.language_model if "." in part else model.model
    found = ("vision_tower", "visual") if part == "tower" else (part.split(".")[-1],)
    for name in found:
        if hasattr(holder, name):
            delattr(holder, name)
    with pytest.raises(TypeError, match=f"{type(model).__name__} {words} .*: load the whole model"):
        vtoken.wrap(model, "random", keep=0.5)


def test_weights_that_were_not_loaded(model_and_inputs):
    with torch.device("meta"):
        model = type(model_and_inputs[0])(model_and_inputs[0].config)
    with pytest.raises(TypeError, match="weights of LlavaForConditionalGeneration are on the meta device"):
        vtoken.wrap(model, "random", keep=0.5)


@pytest.mark.parametrize("family", tiny.CORE)
def test_a_processor_that_does_not_fit(family):
    """The model's own sentence reaches the user, and the wrapped model works afterwards."""
    model, inputs = tiny.make(family, (1,))
    ids = inputs["input_ids"].clone()
    row, column = (ids == tiny.IMAGE_ID).nonzero()[0]
    ids[row, column] = 5  # one placeholder less than features
    with vtoken.reduce(model, "random", keep=0.5), torch.no_grad():
        wanted = model(**inputs).logits
        with pytest.raises(ValueError, match="features and image tokens do not match"):
            model(**{**inputs, "input_ids": ids})
        assert torch.equal(model(**inputs).logits, wanted)


def test_unknown_options(model_and_inputs):
    with pytest.raises(ValueError, match="positions='odd' is unknown"):
        vtoken.wrap(model_and_inputs[0], "random", positions="odd")
    with pytest.raises(ValueError, match="backend='odd' is unknown"):
        vtoken.wrap(model_and_inputs[0], "random", backend="odd")


def test_text_only_prompt_runs_as_ever(model_and_inputs):
    model, _ = model_and_inputs
    ids = torch.randint(3, 180, (2, 9), generator=torch.Generator().manual_seed(0))
    wanted = model.generate(input_ids=ids, max_new_tokens=4, **GREEDY)
    with vtoken.reduce(model, "fopru", keep=0.5):
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4, **GREEDY), wanted)


def test_empty_batch(model_and_inputs):
    model, _ = model_and_inputs
    with vtoken.reduce(model, "random", keep=0.5), pytest.raises(ValueError, match="The batch is empty"):
        model(input_ids=torch.zeros(0, 5, dtype=torch.long))


def test_caches_that_cannot_be_pruned(model_and_inputs):
    model, inputs = model_and_inputs
    with vtoken.reduce(model, PLANS["before"]):
        cache = StaticCache(config=model.config, max_cache_len=200)
        out = generate(model, inputs, past_key_values=cache)
        ids = torch.cat([out, out[:, :4].masked_fill(out[:, :4] == tiny.IMAGE_ID, 5)], 1)
        with pytest.raises(NotImplementedError, match="StaticCache"):
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **GREEDY)
        first = generate(model, inputs, return_dict_in_generate=True)
        with pytest.raises(RuntimeError, match="pruned for a batch of 1, not 2"), torch.no_grad():
            model(input_ids=out[:, -1:].repeat(2, 1), past_key_values=first.past_key_values)


def test_an_error_in_a_reducer_leaves_the_model_usable(model_and_inputs):
    model, inputs = model_and_inputs
    wanted = generate(model, inputs)
    bad = dict(inputs, pixel_values=inputs["pixel_values"] * float("nan"))
    with vtoken.reduce(model, "fopru", keep=0.5):
        with pytest.raises(ValueError, match="not finite"):
            generate(model, bad)
        generate(model, inputs)
    assert torch.equal(generate(model, inputs), wanted)


@pytest.mark.parametrize("family", tiny.CORE)
def test_pickling_a_wrapped_model(family):
    model, inputs = tiny.make(family, (1,))
    with vtoken.reduce(model, "random", keep=0.5):
        for module in (model, model.model, model.model.language_model):
            with pytest.raises(TypeError, match="cannot be pickled"):
                pickle.dumps(module)
    assert torch.equal(generate(pickle.loads(pickle.dumps(model)), inputs), generate(model, inputs))


def test_two_threads_get_right_answers_or_a_sentence(model_and_inputs):
    model, inputs = model_and_inputs
    results = []

    def work():
        for _ in range(5):
            try:
                results.append(generate(model, inputs, 4))
            except RuntimeError as error:
                results.append(str(error))

    with vtoken.reduce(model, "random", keep=0.5):
        wanted = generate(model, inputs, 4)
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 10
    for result in results:
        assert "Two threads" in result if isinstance(result, str) else torch.equal(result, wanted)
