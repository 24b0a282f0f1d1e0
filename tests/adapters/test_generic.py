# SPDX-License-Identifier: Apache-2.0
"""The adapter by convention, on a tiny model of every type that it serves."""

from __future__ import annotations

import pytest
import torch
import zoo
from oracles import PLANS, TOLERANCE, TestReducer, extended, generate, visual_and_real

import vtoken
from vtoken.adapters import adapter_for
from vtoken.adapters.generic import GenericAdapter

BATCH = (1, 2, 0)
KINDS = list(zoo.BUILDERS)
every_family = pytest.mark.parametrize("family", KINDS)
CUTS = {"before": PLANS["before"], "between": TestReducer(before=0.7, at=((1, 0.6), (2, 0.4)))}
every_plan = pytest.mark.parametrize("plan", CUTS)
STEPS = {"output_logits": True, "return_dict_in_generate": True}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_the_zoo_holds_every_type_that_is_served():
    assert set(GenericAdapter.model_types) == set(KINDS)


@every_family
def test_keep_all_is_bit_identical_and_unwrap_leaves_no_trace(family):
    case = zoo.make(family, BATCH)
    model, inputs = case.model, case.inputs
    assert type(adapter_for(model)) is GenericAdapter
    with torch.no_grad():
        logits, ids = model(**inputs).logits, generate(model, inputs)
        with vtoken.reduce(model, "random", keep=1.0):
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(generate(model, inputs), ids)
        assert torch.equal(model(**inputs).logits, logits)


@every_plan
@every_family
def test_dropping_equals_hiding_at_every_decode_step(family, plan):
    case = zoo.make(family, BATCH)
    model, inputs = case.model, case.inputs
    adapter, (visual, real) = adapter_for(model), visual_and_real(inputs)
    with torch.no_grad():
        whole = model(**inputs).logits[:, -1]
        with vtoken.reduce(model, CUTS[plan]):
            out = generate(model, inputs, 3, **STEPS)
            assert vtoken.stats(model).tokens_per_layer < vtoken.stats(model).tokens_in
        assert (out.logits[0] - whole)[:2].abs().max() > 100 * TOLERANCE["atol"]  # or the oracle shows nothing
        length = inputs["input_ids"].shape[1]
        for step in range(3):
            longer = extended(model, inputs, out.sequences[:, length : length + step])
            with zoo.oracle(adapter, CUTS[plan], visual, real):
                wanted = model(**longer).logits[:, -1]
            torch.testing.assert_close(out.logits[step], wanted, **TOLERANCE)


@every_plan
@every_family
def test_cache_equals_no_cache(family, plan):
    case = zoo.make(family, BATCH)
    model, inputs = case.model, case.inputs
    with vtoken.reduce(model, CUTS[plan]):
        assert torch.equal(generate(model, inputs), generate(model, inputs, use_cache=False))


@every_plan
@every_family
def test_batch_equals_alone(family, plan):
    case = zoo.make(family, BATCH)
    model, inputs = case.model, case.inputs
    if family in zoo.UNEQUAL:
        pytest.skip("the unwrapped model's rows depend on their padding")
    with vtoken.reduce(model, CUTS[plan]), torch.no_grad():
        together = model(**inputs).logits
        for row in range(len(BATCH)):
            logits = model(**case.alone(row)).logits
            torch.testing.assert_close(together[row : row + 1, -logits.shape[1] :], logits, **TOLERANCE)
