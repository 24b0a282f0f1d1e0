# SPDX-License-Identifier: Apache-2.0
"""Several documents packed in one row: each gets what it gets alone, its budgets, question and last token included.

The oracle is the document alone under the same reducer. Rows come as transformers' ``DataCollatorWithFlattening`` and
sequence-packing trainers make them; M-RoPE models need four rows of position ids to see packed documents (stock, too).
"""

from __future__ import annotations

import flash
import pytest
import tiny
import torch
from kinds import (
    CASES,
    QWEN,
    decode,
    every_case,
    every_family,
    inputs_of,
    left,
    model_of,
    reduced,
    row_ids,
    up_to_picture,
    with_pictures,
)
from kinds import prompt as batch_of
from oracles import ROWWISE, TOLERANCE, alone, positions

import vtoken

LAYOUTS = {
    "two documents": ((1, 1), ()),
    "text between": ((1, 0, 1), ()),
    "ends with its picture": ((1, 0, 2), (0,)),
}
"""Pictures in each document, and the documents that are cut behind their last picture."""
VARIANTS = {
    # how documents are told apart: (attention, attention mask, cumulative lengths[, M-RoPE positions of pictures only])
    "positions": ("sdpa", None, False),
    "lengths": ("sdpa", None, True),
    "block mask": ("sdpa", torch.bool, False),
    "additive block mask": ("eager", torch.float32, False),
    "block mask, no text positions": ("sdpa", torch.bool, False, "three rows"),
}
MASKED = ("uniform", "fastv", "sparsevlm", "todre", "aim", "cdpruner", "pyramiddrop")
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def documents(model, family, layout):
    """Prompts of batch size 1 without padding, and position ids as ``generate`` gives them."""
    counts, cut = LAYOUTS[layout]
    inputs = inputs_of(family, counts)
    out = []
    for row in range(len(counts)):
        single = alone(inputs, row, counts)
        if row in cut:
            pictures = {name: value for name, value in single.items() if name not in ROWWISE}
            single = batch_of([up_to_picture(row_ids(single, 0))], pictures, family)
        out.append((single, positions(model, single)))
    pictures = with_pictures(inputs, counts, list(range(sum(counts))))
    return [({k: v for k, v in single.items() if k != "attention_mask"}, at) for single, at in out], pictures


def packed(model, family, layout, variant):
    """One row that holds all documents, and their lengths."""
    _, dtype, cumulative, *axes = VARIANTS[variant]
    found, pictures = documents(model, family, layout)
    lengths = [single["input_ids"].shape[1] for single, _ in found]
    row = {name: torch.cat([single[name] for single, _ in found], 1) for name in ROWWISE & found[0][0].keys()}
    row |= {"position_ids": torch.cat([at for _, at in found], -1), **pictures}
    if axes and row["position_ids"].dim() == 3:
        row["position_ids"] = row["position_ids"][1:]
    if dtype is not None:
        sees = torch.block_diag(*[torch.ones(length, length).tril() for length in lengths]).bool()[None, None]
        mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
        row["attention_mask"] = sees if dtype == torch.bool else mask
    if cumulative:
        row["cu_seq_lens_q"] = row["cu_seq_lens_k"] = torch.tensor([0, *lengths]).cumsum(0).int()
        row["max_length_q"] = row["max_length_k"] = max(lengths)
    return row, lengths


def counts_of(model):
    """What the last prefill left of each picture, layer by layer."""
    return [tuple(counts) for counts in zip(*(kept for _, kept in vtoken.stats(model).layers), strict=True)]


@torch.no_grad()
def check(model, family, layout, variant, tolerance=TOLERANCE):
    """A wrapped ``model``: every document of the row has the logits and the counts that it has alone."""
    row, lengths = packed(model, family, layout, variant)
    together = model(**row, use_cache=False).logits.split(lengths, 1)
    budgets, wanted = counts_of(model), []
    for number, (single, at) in enumerate(documents(model, family, layout)[0]):
        logits = model(**single, position_ids=at, use_cache=False).logits
        there = torch.ones(1, lengths[number], dtype=torch.bool)
        if "pixel_values" in single:
            wanted += counts_of(model)
            there = left(model, single)
        torch.testing.assert_close(together[number][there], logits[there], **tolerance, msg=lambda m: f"{number}: {m}")
    assert budgets == wanted


@torch.no_grad()
def check_stock(model, family, layout, variant):
    row, lengths = packed(model, family, layout, variant)
    together = model(**row, use_cache=False).logits.split(lengths, 1)
    for number, (single, at) in enumerate(documents(model, family, layout)[0]):
        torch.testing.assert_close(together[number], model(**single, position_ids=at, use_cache=False).logits)
    return together


@every_variant
@pytest.mark.parametrize("layout", LAYOUTS)
@every_family
def test_stock_models_pass_this_harness_and_keep_all_is_stock(family, layout, variant):
    model = model_of(family, VARIANTS[variant][0])
    stock = check_stock(model, family, layout, variant)
    row, _ = packed(model, family, layout, variant)
    with reduced(model, "uniform", 1.0), torch.no_grad():
        assert torch.equal(model(**row, use_cache=False).logits, torch.cat(stock, 1))


@pytest.mark.parametrize(
    ("family", "name", "variant"),
    [(*case, v) for case in CASES for v in VARIANTS if len(VARIANTS[v]) == 3 or case[0] in QWEN],
)
def test_every_document_of_a_row_gets_what_it_gets_alone(family, name, variant):
    """A document that ends with its picture, one of text only and one with two pictures."""
    model = model_of(family, VARIANTS[variant][0])
    with reduced(model, name):
        check(model, family, "ends with its picture", variant)


@pytest.mark.parametrize("layout", ["two documents", "text between"])
@every_case
def test_documents_told_by_restarting_positions(family, name, layout):
    model = model_of(family)
    with reduced(model, name):
        check(model, family, layout, "positions")


@pytest.mark.parametrize("variant", ["positions", "block mask"])
@pytest.mark.parametrize(("family", "name"), [case for case in CASES if case[1] in MASKED])
def test_hiding_in_a_packed_row(family, name, variant):
    model = model_of(family)
    with reduced(model, name, backend="mask"):
        check(model, family, "text between", variant)


@pytest.mark.parametrize("variant", ["positions", "lengths"])
@pytest.mark.parametrize("name", [None, *MASKED])
@every_family
def test_flash_attention_on_a_packed_row(monkeypatch, family, name, variant):
    """On stand-ins for the kernels: cumulative lengths given by the caller count the tokens that are there."""
    model = tiny.make(family, (1,))[0]
    flash.install(monkeypatch, model)
    if name is None:
        if family == "llava" and variant == "lengths" and tiny.VERSION >= (5, 24):
            pytest.skip("the unwrapped model hands the text's lengths on to its tower, since transformers 5.24")
        check_stock(model, family, "text between", variant)
        return
    with reduced(model, name):
        check(model, family, "text between", variant)
    assert "varlen" in flash.CALLS


@every_family
def test_a_decode_step_after_packed_training_is_not_disturbed(family):
    """A packed pass leaves nothing behind in a model that then generates."""
    model, inputs = model_of(family), inputs_of(family, (1, 2))
    with reduced(model, "uniform"), torch.no_grad():
        wanted = decode(model, inputs)
        model(**packed(model, family, "text between", "positions")[0], use_cache=False)
        found = decode(model, inputs)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
