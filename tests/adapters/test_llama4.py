# SPDX-License-Identifier: Apache-2.0
"""Llama 4: queries that grow with their place in the sequence, of tokens whose place among the rows has changed."""

from __future__ import annotations

import pytest
import torch
import zoo
from oracles import TOLERANCE, TestReducer, generate, visual_and_real

import vtoken
from vtoken.adapters import adapter_for
from vtoken.reducers.base import Reducer

CUTS = {"before": TestReducer(before=0.4), "between": TestReducer(before=0.7, at=((1, 0.6), (2, 0.4)))}
FLOOR = 4
CHUNKS = "attention_chunk_size"


class Rerun(Reducer):
    """Runs a layer on the text alone."""

    name = "rerun"

    def layers(self, depth):
        return (1,)

    def at_layer(self, layer, ctx):
        ctx.rerun(ctx.text)


@pytest.fixture(scope="module")
def case():
    """A model in which places count from the fourth one on."""
    case = zoo.make("llama4", (1, 2, 0), seed=7)
    for layer in case.model.language_model.model.layers:
        layer.self_attn.floor_scale, layer.self_attn.attn_scale = FLOOR, 1.0
    return case


@pytest.mark.parametrize("plan", CUTS)
def test_queries_keep_the_scale_of_their_own_places(case, plan):
    model, inputs = case.model, case.inputs
    adapter, (visual, real) = adapter_for(model), visual_and_real(inputs)
    with vtoken.reduce(model, CUTS[plan]):
        out = generate(model, inputs, 3, output_logits=True, return_dict_in_generate=True)
    length = inputs["input_ids"].shape[1]
    for step in range(3):
        longer = zoo.longer(model, inputs, out.sequences[:, length : length + step])
        with zoo.oracle(adapter, CUTS[plan], visual, real), torch.no_grad():
            wanted = model(**longer).logits[:, -1]
        torch.testing.assert_close(out.logits[step], wanted, **TOLERANCE)


def test_what_runs_a_layer_on_a_part_of_the_rows_is_refused(case):
    with vtoken.reduce(case.model, Rerun()), pytest.raises(NotImplementedError, match="on a part of them"):
        case.model(**case.inputs)


def test_a_static_cache_that_counts_places_is_refused(case, monkeypatch):
    model, inputs = case.model, {name: value[:1] for name, value in case.inputs.items()}
    model.config.text_config.attention_chunk_size = 1000  # static caches of longer prompts are refused for the chunks
    try:
        with (
            vtoken.reduce(model, CUTS["before"]),
            pytest.raises(NotImplementedError, match="does not know its logical"),
        ):
            generate(model, inputs, 3, cache_implementation="static")
    finally:
        model.config.text_config.attention_chunk_size = 14
