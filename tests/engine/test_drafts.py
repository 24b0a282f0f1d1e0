# SPDX-License-Identifier: Apache-2.0
"""The choice made at prefill depends on the prompt only: not on drafts, labels or tokens generated without a cache.

The oracles are unassisted decoding, a forward on the prompt alone, and cached decoding with teacher forcing.

Self-drafting (``assistant_early_exit``) is not among the modes: the stock models fail with "'LlavaConfig' object has no
attribute 'num_hidden_layers'", since transformers 5.23 looks for the depth in the outer configuration.
"""

from __future__ import annotations

import contextlib
import copy
import functools

import pytest
import tiny
import torch
from kinds import CASES, QWEN, decode, every_case, every_family, inputs_of, kept_positions, left, model_of, reduced
from oracles import ROWWISE, TOLERANCE, alone, built, extended

import vtoken

MODES = {
    "other draft": lambda family: {"assistant_model": model_of(family, seed=5)},  # is rejected most of the time
    "twin draft": lambda family: {"assistant_model": twin_of(family)},  # is accepted most of the time
    "prompt lookup": lambda family: {"prompt_lookup_num_tokens": 3},
}
RAGGED = (1, 2)


@functools.cache
def twin_of(family):
    return copy.deepcopy(model_of(family))


@functools.cache
def plain(family, name=None):
    """The unassisted answer, of the stock model or under a reducer."""
    model, inputs = model_of(family), repeating(family)
    with contextlib.nullcontext() if name is None else reduced(model, name):
        return decode(model, inputs)


def repeating(family):
    """A prompt whose end occurs before, so that a look-up finds candidates."""
    inputs = inputs_of(family, (2,))
    ids = inputs["input_ids"].clone()
    ids[0, -4:-2] = ids[0, -2:]
    return {**inputs, "input_ids": ids}


def same(found, wanted):
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], **TOLERANCE)


@pytest.mark.parametrize("mode", MODES)
@every_family
def test_stock_models_pass_this_harness(family, mode):
    same(decode(model_of(family), repeating(family), **MODES[mode](family)), plain(family))


def assisted(family, name, mode):
    wanted, options = plain(family, name), MODES[mode](family)  # a twin is copied before the model is wrapped
    with reduced(model_of(family), name):
        same(decode(model_of(family), repeating(family), **options), wanted)


@pytest.mark.parametrize("mode", ["twin draft", "prompt lookup"])
@every_case
def test_an_assisted_answer_is_the_plain_one(family, name, mode):
    assisted(family, name, mode)


@pytest.mark.parametrize(("family", "name"), [case for case in CASES if built(case[1]).uses_text])
def test_rejected_drafts_do_not_change_the_answer(family, name):
    """For the reducers that read text, since a wrong draft is other text."""
    assisted(family, name, "other draft")


@every_case
def test_a_wrapped_draft_of_a_wrapped_target(family, name):
    model, draft, wanted = model_of(family), twin_of(family), plain(family, name)
    with reduced(model, name), reduced(draft, name, 0.25):
        same(decode(model, repeating(family), assistant_model=draft), wanted)


@every_case
def test_a_wrapped_draft_of_a_stock_target(family, name):
    """Or a sentence: transformers hands the target's features to the draft, which then cannot read its own tower."""
    model, draft, wanted = model_of(family), twin_of(family), plain(family)
    with reduced(draft, name):
        try:
            found = decode(model, repeating(family), assistant_model=draft)
        except NotImplementedError as error:
            assert "mm_encoder_outputs" in str(error)  # noqa: PT017 - both outcomes are right
        else:
            same(found, wanted)


@every_case
def test_decoding_without_a_cache_is_decoding_with_one(family, name):
    model, inputs = model_of(family), inputs_of(family, RAGGED)
    with reduced(model, name):
        same(decode(model, inputs, use_cache=False), decode(model, inputs))


def answered(model, inputs, tokens=4):
    """The prompt and an answer of given tokens: inputs with position ids, and labels for the answer only."""
    generator = torch.Generator().manual_seed(11)
    answer = torch.randint(20, 180, (len(inputs["input_ids"]), tokens), generator=generator)
    longer = extended(model, inputs, answer)
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answer], 1)
    return longer, labels


def asked(longer, length):
    """The prompt, of ``length`` tokens, of what `answered` returned."""
    cut = {name: longer[name][..., :length] for name in {*ROWWISE, "position_ids"} & longer.keys()}
    return {**longer, **cut}


def forced(model, longer, length):
    """Logits (B, 1 + answer, V) of cached decoding that is fed the answer token by token."""
    out = model(**asked(longer, length), use_cache=True)
    logits = [out.logits[:, -1]]
    for end in range(length + 1, longer["input_ids"].shape[1] + 1):
        step = {
            "input_ids": longer["input_ids"][:, end - 1 : end],
            "attention_mask": longer["attention_mask"][:, :end],
            "position_ids": longer["position_ids"][..., end - 1 : end],
        }
        out = model(**step, past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


def check_labels(model, inputs, reducer):
    """``reducer``: a context manager that makes the model reduce, or nothing for the stock model."""
    length = inputs["input_ids"].shape[1]
    longer, labels = answered(model, inputs)
    with reducer as wrapped, torch.no_grad():
        steps = forced(model, longer, length)
        unanswered = model(**asked(longer, length), use_cache=False).logits
        there = [mask for _, mask in kept_positions(model, inputs)] if wrapped else []
        at = left(model, inputs) if wrapped else inputs["attention_mask"].bool()
        found = model(**longer, labels=labels, use_cache=False).logits
        again = [mask[:, :length] for _, mask in kept_positions(model, longer)] if wrapped else []
    assert len(again) == len(there)
    assert all(map(torch.equal, again, there)), "the answer changed the choice"
    torch.testing.assert_close(found[:, :length][at], unanswered[at], **TOLERANCE)
    torch.testing.assert_close(found[:, length - 1 :], steps, **TOLERANCE)


@every_family
def test_stock_models_pass_the_harness_of_labels(family):
    check_labels(model_of(family), inputs_of(family, RAGGED), contextlib.nullcontext())


@every_case
def test_labels_do_not_change_the_choice(family, name):
    model = model_of(family)
    check_labels(model, inputs_of(family, RAGGED), reduced(model, name))


def right_padded(rows):
    """A batch of single rows that are padded on the right."""
    length = max(row["input_ids"].shape[1] for row in rows)
    pad = {"input_ids": tiny.PAD, "labels": -100}
    names = {"input_ids", "attention_mask", "mm_token_type_ids", "labels", "position_ids"} & rows[0].keys()
    dim = {name: rows[0][name].dim() - 2 for name in names}
    return {
        name: torch.cat(
            [
                torch.nn.functional.pad(row[name], (0, length - row[name].shape[-1]), value=pad.get(name, 0))
                for row in rows
            ],
            dim[name],
        )
        for name in names
    }


def check_training_batch(family, reducer):
    model, counts = model_of(family), RAGGED
    inputs = inputs_of(family, counts)
    rows = []
    for row in range(len(counts)):
        longer, labels = answered(model, alone(inputs, row, counts), 3 + row)
        rows.append({**longer, "labels": labels})
    pictures = {name: value for name, value in inputs.items() if name not in ROWWISE}
    with reducer as wrapped, torch.no_grad():
        together = model(**pictures, **right_padded(rows), use_cache=False).logits
        counted = vtoken.stats(model).layers if wrapped else []
        single = []
        for number, row in enumerate(rows):
            logits = model(**row, use_cache=False).logits
            at = left(model, row) if wrapped else row["attention_mask"].bool()
            single += [vtoken.stats(model).layers] if wrapped else []
            torch.testing.assert_close(together[number : number + 1, : at.shape[1]][at], logits[at], **TOLERANCE)
    if wrapped:
        assert [counts for _, counts in counted] == [a + b for (_, a), (_, b) in zip(*single, strict=True)]


@every_family
def test_stock_models_pass_the_harness_of_training_batches(family):
    check_training_batch(family, contextlib.nullcontext())


@every_case
def test_a_training_batch_padded_on_the_right_is_its_rows_alone(family, name):
    """Answers of unequal length begin at unequal columns, behind prompts of unequal length."""
    check_training_batch(family, reduced(model_of(family), name))


def test_mrope_families_are_those_with_rows_of_positions():
    """The harness slices position ids of both shapes."""
    for family in tiny.CORE:
        dims = answered(model_of(family), inputs_of(family, (1,)))[0]["position_ids"].dim()
        assert (dims == 3) == (family in QWEN)
