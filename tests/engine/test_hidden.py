# SPDX-License-Identifier: Apache-2.0
"""Pictures that the caller's mask hides, and prompts whose last token is a visual one.

The oracles are the same batch with the hidden picture taken out, each row alone, and the stock model under explicit
masks that hide what ``vtoken.stats`` says was dropped.
"""

from __future__ import annotations

import contextlib

import pytest
import tiny
import torch
from cases import REWRITING
from kinds import (
    CASES,
    QWEN,
    SUPPRESSED,
    decode,
    every_case,
    every_family,
    hiding,
    inputs_of,
    kept_positions,
    left,
    model_of,
    placed,
    placed_forward,
    prompt,
    reduced,
    row_ids,
    up_to_picture,
    with_pictures,
)
from oracles import ROWWISE, TOLERANCE, alone, positions

import vtoken

HIDDEN = (2, 1, 0)
"""Pictures in the rows of a batch with hidden ones."""
ENDS = (1, 1, 0, 1)
"""Pictures in the rows of a batch in which row 0 ends with its picture and row 1 is nothing else."""
ENDED = (0, 1)
"""Pictures behind which a row of that batch ends."""
GATED = {"aim", "dyvte", "todre"}
"""Reducers that decide by the text when visual tokens leave the decoder: counts inside of it depend on the prompt."""


def pixels(inputs):
    return {name: value for name, value in inputs.items() if name not in ROWWISE}


# ---------------------------------------------------------------- the oracle itself
@pytest.mark.parametrize(("family", "name"), [case for case in CASES if case[1] not in REWRITING])
def test_an_ordinary_batch_is_the_stock_model_with_dropped_tokens_hidden(family, name):
    """Dropping is hiding, for every reducer that only drops: what the tests below rest on."""
    model, inputs = model_of(family), inputs_of(family, ENDS)
    with reduced(model, name):
        logits = placed_forward(model, inputs).logits
        kept = kept_positions(model, inputs)
    there = kept[-1][1] & inputs["attention_mask"].bool()
    with hiding(model, kept, inputs["attention_mask"].bool()):
        wanted = placed_forward(model, inputs).logits
    torch.testing.assert_close(logits[there], wanted[there], **TOLERANCE)


# ---------------------------------------------------------------- pictures hidden by a mask
def hide(inputs, picture, part):
    """The batch with ``part`` (a slice) of the placeholders of ``picture`` hidden by its 2-D mask."""
    mask = inputs["attention_mask"].clone()
    row, places = placed(inputs)[picture]
    mask[row, places[part]] = 0
    return {**inputs, "attention_mask": mask}


def without(inputs, family, picture):
    """The batch with ``picture`` taken out, and ``gather``: position-wise values of the batch for what is left."""
    row, places = placed(inputs)[picture]
    real = inputs["attention_mask"].bool()
    stays = real.clone()
    stays[row, places] = False
    rows = [ids[at] for ids, at in zip(inputs["input_ids"], stays, strict=True)]
    chosen = [number for number in range(sum(HIDDEN)) if number != picture]
    shorter = prompt(rows, with_pictures(inputs, HIDDEN, chosen), family)

    def gather(values):
        out = values.new_zeros(*values.shape[:-1], shorter["input_ids"].shape[1])
        out[..., shorter["attention_mask"].bool()] = values[..., stays]
        return out

    return shorter, gather, stays


def check_hidden(family, picture, reducer):
    """The same logits, at positions that are there, with the picture hidden and with it taken out."""
    model, inputs = model_of(family), inputs_of(family, HIDDEN)
    at = positions(model, inputs)
    shorter, gather, stays = without(inputs, family, picture)
    with reducer as wrapped, torch.no_grad():
        hidden = placed_forward(model, hide(inputs, picture, slice(None)), position_ids=at).logits
        counts = [image.kept for image in vtoken.stats(model).images] if wrapped else []
        wanted = placed_forward(model, shorter, position_ids=gather(at)).logits
        there = left(model, shorter) if wrapped else shorter["attention_mask"].bool()
        fewer = [image.kept for image in vtoken.stats(model).images] if wrapped else []
    compare = there[shorter["attention_mask"].bool()]
    found, wanted = hidden[stays], wanted[shorter["attention_mask"].bool()]
    torch.testing.assert_close(found[compare], wanted[compare], **TOLERANCE)
    assert [kept for number, kept in enumerate(counts) if number != picture] == fewer


@pytest.mark.parametrize("picture", range(sum(HIDDEN)))
@every_family
def test_stock_models_pass_the_harness_of_hidden_pictures(family, picture):
    check_hidden(family, picture, contextlib.nullcontext())


@pytest.mark.parametrize("picture", [0, 2])
@every_case
def test_a_hidden_picture_is_as_if_taken_out(family, name, picture):
    """One of two pictures in a row, and the only picture of a row."""
    check_hidden(family, picture, reduced(model_of(family), name))


def partly_hidden(family):
    """A batch in which a part of two pictures is hidden: the first tokens of one, the last of the other."""
    inputs = inputs_of(family, HIDDEN)
    for picture, share in ((0, 0.4), (2, -0.5)):
        tokens = int(len(placed(inputs)[picture][1]) * share)
        inputs = hide(inputs, picture, slice(None, tokens) if share > 0 else slice(tokens, None))
    return inputs


def check_partly(family, reducer):
    """Rows alone give the same; what is hidden from the picture's row is hidden from all."""
    model, inputs = model_of(family), partly_hidden(family)
    whole = inputs_of(family, HIDDEN)
    at = positions(model, whole)
    with reducer as wrapped, torch.no_grad():
        found = placed_forward(model, inputs, position_ids=at).logits
        kept = kept_positions(model, inputs) if wrapped else [(0, torch.ones_like(inputs["input_ids"]).bool())]
        there = kept[-1][1] & inputs["attention_mask"].bool()
        for row in range(len(HIDDEN)):
            single = alone(whole, row, HIDDEN)
            real = whole["attention_mask"][row].bool()
            single["attention_mask"] = inputs["attention_mask"][row : row + 1, real]
            logits = placed_forward(model, single, position_ids=at[..., row : row + 1, real]).logits
            torch.testing.assert_close(found[row][there[row]], logits[0][there[row][real]], **TOLERANCE)
    return inputs, at, found, kept, there


@every_family
def test_stock_models_pass_the_harness_of_partly_hidden_pictures(family):
    inputs, at, found, kept, there = check_partly(family, contextlib.nullcontext())
    with hiding(model_of(family), kept, inputs["attention_mask"].bool()):
        wanted = placed_forward(model_of(family), inputs, position_ids=at).logits
    torch.testing.assert_close(found[there], wanted[there], **TOLERANCE)


@every_case
def test_a_partly_hidden_picture(family, name):
    model = model_of(family)
    inputs, at, found, kept, there = check_partly(family, reduced(model, name))
    if name in REWRITING:
        return
    with hiding(model, kept, inputs["attention_mask"].bool()):
        wanted = placed_forward(model, inputs, position_ids=at).logits
    torch.testing.assert_close(found[there], wanted[there], **TOLERANCE)


@pytest.mark.parametrize(("family", "name"), [case for case in CASES if case[0] not in QWEN])
def test_decoding_with_hidden_pictures(family, name):
    """Each row alone. Stock Qwen models refuse to place the positions of a hidden picture."""
    model, inputs, whole = model_of(family), partly_hidden(family), inputs_of(family, HIDDEN)
    inputs = hide(inputs, 1, slice(None))
    with reduced(model, name):
        ids, logits = decode(model, inputs)
        for row in range(len(HIDDEN)):
            single = alone(whole, row, HIDDEN)
            real = whole["attention_mask"][row].bool()
            single["attention_mask"] = inputs["attention_mask"][row : row + 1, real]
            found = decode(model, single)
            assert torch.equal(found[0][:, -4:], ids[row : row + 1, -4:])
            torch.testing.assert_close(found[1], logits[row : row + 1], **TOLERANCE)


# ---------------------------------------------------------------- prompts that end with a picture
def ending(family):
    """Row 0 ends with its picture, row 1 is nothing but one, row 2 is text, row 3 ends with text."""
    inputs = inputs_of(family, ENDS)
    rows = [row_ids(inputs, row) for row in range(len(ENDS))]
    rows[0], rows[1] = up_to_picture(rows[0]), rows[1][rows[1] == tiny.IMAGE_ID]
    return prompt(rows, pixels(inputs), family)


def layer_counts(model):
    """Tokens of each picture after every cut: (cuts, pictures)."""
    return [counts for _, counts in vtoken.stats(model).layers]


@every_family
def test_stock_models_pass_the_harness_of_ends(family):
    """Rows alone, and explicit masks that hide nothing."""
    model, inputs = model_of(family), ending(family)
    logits = placed_forward(model, inputs).logits
    real = inputs["attention_mask"].bool()
    with hiding(model, [(0, torch.ones_like(real))], real):
        torch.testing.assert_close(placed_forward(model, inputs).logits[real], logits[real], **TOLERANCE)
    for row in range(len(ENDS)):
        single = placed_forward(model, alone(inputs, row, ENDS)).logits[0]
        torch.testing.assert_close(logits[row, real[row]], single, **TOLERANCE)


@every_case
def test_the_last_token_stays_inside_its_budget(family, name):
    """As many tokens as the picture has left in the middle of a prompt, and one where none would be left."""
    model, inputs = model_of(family), ending(family)
    with reduced(model, name):
        placed_forward(model, inputs_of(family, ENDS))
        middle = layer_counts(model)
        placed_forward(model, inputs)
        found, kept = layer_counts(model), vtoken.stats(model).kept
    for picture in ENDED:
        last = len(placed(inputs)[picture][1]) - 1
        assert all(bool(there[picture, last]) for _, there in kept), "the last token of the row was dropped"
    wanted = [[max(count, int(item in ENDED)) for item, count in enumerate(counts)] for counts in middle]
    assert found[0] == wanted[0]
    if name not in GATED:
        assert found == wanted


@every_case
def test_the_next_token_comes_from_the_state_of_the_last_one(family, name):
    """The stock model with the dropped tokens hidden; and no other position stands in for the last one."""
    model, inputs = model_of(family), ending(family)
    with reduced(model, name):
        logits = placed_forward(model, inputs).logits
        kept = kept_positions(model, inputs)
    there = kept[-1][1] & inputs["attention_mask"].bool()
    for row, at in enumerate(there):
        twins = [i for i in at.nonzero()[:-1, 0].tolist() if torch.equal(logits[row, i], logits[row, -1])]
        assert not twins, f"row {row} returns the logits of position {twins[0]} as those of its last token"
    assert bool(there[:, -1].all())
    if name in REWRITING:
        return
    with hiding(model, kept, inputs["attention_mask"].bool()):
        wanted = placed_forward(model, inputs).logits
    torch.testing.assert_close(logits[there], wanted[there], **TOLERANCE)


@every_case
def test_rows_that_end_with_a_picture_are_decoded_as_alone(family, name):
    """And the first token is the most likely one of the forward pass."""
    model, inputs = model_of(family), ending(family)
    with reduced(model, name):
        last = placed_forward(model, inputs).logits[:, -1].clone()
        ids, logits = decode(model, inputs)
        singles = [decode(model, alone(inputs, row, ENDS)) for row in range(len(ENDS))]
    last[:, SUPPRESSED] = float("-inf")
    assert torch.equal(last.argmax(1), ids[:, -4])
    for row, (found, steps) in enumerate(singles):
        assert torch.equal(found[0, -4:], ids[row, -4:])
        torch.testing.assert_close(steps, logits[row : row + 1], **TOLERANCE)


# ---------------------------------------------------------------- messages
def odd_prompts(family):
    """Prompts that stock models answer or refuse with an error of their own."""
    inputs = inputs_of(family, HIDDEN)
    row, places = placed(inputs)[0]
    missing, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
    missing[row, places[0]] = 7
    mask[inputs["input_ids"] == tiny.IMAGE_ID] = 0
    return {
        "a placeholder is missing": {**inputs, "input_ids": missing},
        "all pictures are hidden": {**inputs, "attention_mask": mask},
        "a picture is hidden": hide(inputs, 0, slice(None)),
        "a part is hidden": partly_hidden(family),
    }


@pytest.mark.parametrize("wrapped", [False, True], ids=["stock", "wrapped"])
@every_family
def test_no_message_blames_the_version_of_transformers(family, wrapped):
    model, prompts = model_of(family), odd_prompts(family)
    unplaceable = prompts.pop("a placeholder is missing")
    at = positions(model, inputs_of(family, HIDDEN))
    with reduced(model, "uniform") if wrapped else contextlib.nullcontext(), torch.no_grad():
        with pytest.raises(ValueError) as error:
            model(**unplaceable, position_ids=at)
        assert "transformers" not in str(error.value)
        for inputs in prompts.values():
            assert model(**inputs, position_ids=at).logits.isfinite().all()
