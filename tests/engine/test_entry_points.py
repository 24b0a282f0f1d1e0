# SPDX-License-Identifier: Apache-2.0
"""Ways into a wrapped model beside ``forward`` and ``generate`` of the whole prompt.

Features asked for by hand equal those of the unwrapped model, chunked prefill gives the plain answer, and the base
model of ``AutoModel`` computes what the model around it computes.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from kinds import decode, every_case, every_family, inputs_of, model_of, placed, placed_forward, prompt, reduced
from oracles import ROWWISE, TOLERANCE, built, positions

import vtoken

VIDEO = ("llava_onevision", "qwen2_5_vl", "qwen3_vl")
"""Core families with ``get_video_features``."""


def tensors(value):
    """The tensors of nested tuples and lists, with the shape of the nesting."""
    if isinstance(value, (tuple, list)):
        return [tensors(part) for part in value]
    return value


def equal(found, wanted):
    if isinstance(wanted, list):
        return isinstance(found, list) and len(found) == len(wanted) and all(map(equal, found, wanted))
    return torch.equal(found, wanted) if isinstance(wanted, torch.Tensor) else found == wanted


def features(model, inputs, modality, where, **options):
    owner = model if where == "outer" else model.model
    given = {name: value for name, value in inputs.items() if name not in ROWWISE}
    return getattr(owner, f"get_{modality}_features")(**given, **options)


# ---------------------------------------------------------------- features
def check_features(model, inputs, modality, where, name):
    with torch.no_grad():
        wanted = features(model, inputs, modality, where)
        if name in ("tower-prune", "ipcv"):  # the tower computes less: then both ways of asking must agree
            with reduced(model, name, 0.25):
                wanted = features(model, inputs, modality, where)
                found = features(model, inputs, modality, where, return_dict=False)
        else:
            with reduced(model, name, 0.25):
                found = features(model, inputs, modality, where, return_dict=False)
                named = features(model, inputs, modality, where)
            assert equal(tensors(named.to_tuple()), tensors(wanted.to_tuple()))
    assert isinstance(found, tuple)
    assert equal(tensors(found), tensors(wanted.to_tuple()))


@pytest.mark.parametrize("where", ["outer", "base"])
@every_family
def test_stock_models_return_the_values_of_their_output_as_a_tuple(family, where):
    model, inputs = model_of(family), inputs_of(family, (2,))
    with torch.no_grad():
        found = features(model, inputs, "image", where, return_dict=False)
        assert equal(tensors(found), tensors(features(model, inputs, "image", where).to_tuple()))


@pytest.mark.parametrize("where", ["outer", "base"])
@every_case
def test_features_of_pictures_as_a_tuple(family, name, where):
    check_features(model_of(family), inputs_of(family, (2,)), "image", where, name)


@pytest.mark.parametrize("where", ["outer", "base"])
@pytest.mark.parametrize("name", ["uniform", "fastv", "hiprune", "zooprune"])
@pytest.mark.parametrize("family", VIDEO)
def test_features_of_clips_as_a_tuple(family, name, where):
    """Reducers that read nothing, decoder attention, tower attention and the projector's input."""
    inputs = tiny.make(family, (1,), video=True)[1]
    check_features(model_of(family), inputs, "video", where, name)


@every_family
def test_asking_for_features_does_not_disturb_the_next_pass(family):
    model, inputs = model_of(family), inputs_of(family, (2,))
    with reduced(model, "uniform"):
        wanted = placed_forward(model, inputs).logits
        with torch.no_grad():
            features(model, inputs_of(family, (1,)), "image", "outer")
        assert torch.equal(placed_forward(model, inputs).logits, wanted)


# ---------------------------------------------------------------- chunked prefill
def two_chunks_with_pictures(family):
    """A prompt with a picture in each of its first two chunks, and text in the rest; the size of a chunk."""
    inputs = inputs_of(family, (2,))
    first, second = (len(places) for _, places in placed(inputs))
    size = max(first, second) + 5
    return chunks(family, inputs, [3, first, size - first - 3 + 2, second, 9]), size


def question_in_the_last_chunk(family):
    """A system prompt that fills a chunk, then a picture and the question in another one; the size of a chunk."""
    inputs = inputs_of(family, (1,))
    tokens = len(placed(inputs)[0][1])
    return chunks(family, inputs, [tokens + 6, tokens, 5]), tokens + 6


def chunks(family, inputs, segments):
    """A prompt of text and pictures in turn, of the given lengths."""
    generator = torch.Generator().manual_seed(4)
    parts = [
        torch.full((length,), tiny.IMAGE_ID) if number % 2 else torch.randint(3, 180, (length,), generator=generator)
        for number, length in enumerate(segments)
    ]
    pictures = {name: value for name, value in inputs.items() if name not in ROWWISE}
    return prompt([torch.cat(parts)], pictures, family)


PROMPTS = {"pictures in two chunks": two_chunks_with_pictures, "question in the last": question_in_the_last_chunk}
every_prompt = pytest.mark.parametrize("what", PROMPTS)


def answers_equal(found, wanted):
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], **TOLERANCE)


@every_prompt
@every_family
def test_stock_models_pass_the_harness_of_chunks(family, what):
    model, (inputs, size) = model_of(family), PROMPTS[what](family)
    whole = [int(places[0]) // size == int(places[-1]) // size for _, places in placed(inputs)]
    assert all(whole), "a picture is cut"
    assert inputs["input_ids"].shape[1] > size
    answers_equal(decode(model, inputs, prefill_chunk_size=size), decode(model, inputs))
    answers_equal(decode(model, inputs, prefill_chunk_size=size - 2), decode(model, inputs))


@every_prompt
@every_case
def test_chunked_prefill_gives_the_plain_answer(family, name, what):
    """Or a sentence, where a choice or a layer's work depends on parts of the prompt that come with another chunk."""
    model, (inputs, size) = model_of(family), PROMPTS[what](family)
    refusable = built(name).uses_text or "light" in built(name).stages
    with reduced(model, name):
        wanted = decode(model, inputs)
        try:
            found = decode(model, inputs, prefill_chunk_size=size)
        except NotImplementedError as error:
            assert refusable, error  # noqa: PT017 - both outcomes are right for these
            assert "prefill_chunk_size" in str(error)  # noqa: PT017
        else:
            answers_equal(found, wanted)


@every_case
def test_a_prompt_that_fits_in_one_chunk(family, name):
    model, inputs = model_of(family), inputs_of(family, (2,))
    with reduced(model, name):
        answers_equal(decode(model, inputs, prefill_chunk_size=500), decode(model, inputs))


@every_family
def test_a_picture_cut_by_the_border_of_a_chunk_is_refused_with_a_sentence(family):
    model, inputs = model_of(family), inputs_of(family, (1,))
    places = placed(inputs)[0][1]
    with reduced(model, "uniform"):
        with pytest.raises(NotImplementedError, match="prefill_chunk_size") as error:
            decode(model, inputs, prefill_chunk_size=int(places[1]))
        assert str(error.value).count(". ") == 0, "one sentence"
        decode(model, inputs)  # and the next call works


# ---------------------------------------------------------------- the base model
def through_base(model, inputs):
    """Logits of the head of ``model`` on what its base model computes."""
    at = positions(model, inputs)
    with torch.no_grad():
        return model.lm_head(model.model(**inputs, position_ids=at).last_hidden_state)


@every_family
def test_stock_models_pass_the_harness_of_base_models(family):
    model, inputs = model_of(family), inputs_of(family, (1, 2))
    torch.testing.assert_close(through_base(model, inputs), placed_forward(model, inputs).logits, **TOLERANCE)


@every_case
def test_a_wrapped_base_model_computes_what_the_whole_model_does(family, name):
    model, inputs = model_of(family), inputs_of(family, (1, 2))
    stock = placed_forward(model, inputs).logits
    with reduced(model, name):
        wanted, counts = placed_forward(model, inputs).logits, vtoken.stats(model).layers
    with reduced(model.model, name):
        torch.testing.assert_close(through_base(model, inputs), wanted, **TOLERANCE)
        assert vtoken.stats(model.model).layers == counts
    assert torch.equal(placed_forward(model, inputs).logits, stock), "unwrapping the base model left something behind"
