# SPDX-License-Identifier: Apache-2.0
"""The adapter by convention, on a tiny model of every type that it serves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
import transformers as tf
import zoo
from oracles import PLANS, TOLERANCE, TestReducer, extended, generate, visual_and_real
from transformers import CONFIG_MAPPING

import vtoken
from vtoken.adapters import adapter_for
from vtoken.adapters.generic import GenericAdapter
from vtoken.engine.tower import VisionRecord

BATCH = (1, 2, 0)
TYPES = Path(__file__).parents[2] / "benchmarks" / "results" / "types.json"
REFUSED = json.loads(TYPES.read_text(encoding="utf-8"))["refused"] if TYPES.is_file() else {}
FAMILIES = [family for family in zoo.BUILDERS if family in CONFIG_MAPPING]  # of the installed transformers
every_family = pytest.mark.parametrize("family", FAMILIES)
CUTS = {"before": PLANS["before"], "between": TestReducer(before=0.7, at=((1, 0.6), (2, 0.4)))}
every_plan = pytest.mark.parametrize("plan", CUTS)
STEPS = {"output_logits": True, "return_dict_in_generate": True}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_the_zoo_holds_every_type_that_is_served():
    assert set(GenericAdapter.model_types) == set(zoo.BUILDERS)


@pytest.mark.parametrize("name", [name for name in zoo.unserved() if name in REFUSED])
def test_the_rest_is_refused_with_the_reason_that_the_table_gives(name):
    sentence = zoo.refusal(name)
    assert sentence == REFUSED[name]
    assert sentence.count(". ") == 0
    assert sentence.endswith(".")


@pytest.mark.skipif(tiny.VERSION != (5, 23), reason="the table is of transformers 5.23")
def test_the_table_has_a_row_for_every_type():
    assert sorted(REFUSED) == zoo.unserved()


def test_cuts_behind_shared_keys_are_refused():
    case = zoo.make("gemma3n", (1,))
    with pytest.raises(NotImplementedError, match="layer 2 made or chose"):
        vtoken.wrap(case.model, TestReducer(at=((3, 0.5),)))


def test_a_text_model_is_refused():
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**tiny.text_config()))
    with pytest.raises(TypeError, match="LlamaForCausalLM has no get_image_features"):
        vtoken.wrap(model, "random", keep=0.5)


def test_placeholders_without_features_are_refused():
    case = zoo.make("deepseek_vl", (1, 1))
    ids = case.inputs["input_ids"].clone()
    adapter = adapter_for(case.model)
    record = VisionRecord([16], adapter.layouts("image", {}, [16]), {})
    with pytest.raises(NotImplementedError, match="32 placeholders in the prompt for 16 visual features"):
        adapter.regroup(record, ids == tiny.IMAGE_ID)


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
        tolerance = {"atol": 3e-4, "rtol": 1e-3} if family in zoo.ROUNDED else TOLERANCE
        with vtoken.reduce(model, CUTS[plan]):
            out = generate(model, inputs, 3, **STEPS)
            assert vtoken.stats(model).tokens_per_layer < vtoken.stats(model).tokens_in
        assert (out.logits[0] - whole)[:2].abs().max() > 100 * TOLERANCE["atol"]  # or the oracle shows nothing
        length = inputs["input_ids"].shape[1]
        for step in range(3):
            longer = extended(model, inputs, out.sequences[:, length : length + step])
            with zoo.oracle(adapter, CUTS[plan], visual, real):
                wanted = model(**longer).logits[:, -1]
            torch.testing.assert_close(out.logits[step], wanted, **tolerance)


@every_plan
@every_family
def test_cache_equals_no_cache(family, plan):
    case = zoo.make(family, BATCH)
    model, inputs = case.model, case.inputs
    with vtoken.reduce(model, CUTS[plan]):
        assert torch.equal(generate(model, inputs), generate(model, inputs, use_cache=False))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in zoo.DYNAMIC])
def test_static_cache_gives_the_same_ids(family):
    case = zoo.make(family, (1, 2))
    with vtoken.reduce(case.model, CUTS["between"]):
        ids = generate(case.model, case.inputs)
        assert torch.equal(generate(case.model, case.inputs, cache_implementation="static"), ids)


@pytest.mark.parametrize("family", zoo.DYNAMIC)
def test_a_static_cache_that_would_be_wrong_is_refused(family):
    case = zoo.make(family, (1, 2))
    wanted = "sliding window of 14 tokens" if family in zoo.SLIDERS else "counts positions by the cache"
    with vtoken.reduce(case.model, CUTS["between"]), pytest.raises(NotImplementedError, match=wanted):
        generate(case.model, case.inputs, cache_implementation="static")


@every_plan
@pytest.mark.parametrize("family", zoo.CLIPS)
def test_clips(family, plan):
    """A clip is one item, also where its steps are apart and stand behind placeholders of pictures."""
    case = zoo.clips(family)
    model, inputs = case.model, case.inputs
    adapter, (visual, real) = adapter_for(model), visual_and_real(inputs)
    with vtoken.reduce(model, CUTS[plan]):
        out = generate(model, inputs, 2, **STEPS)
        assert vtoken.stats(model).tokens_in == 2 * zoo.CLIP_TOKENS
    length = inputs["input_ids"].shape[1]
    for step in range(2):
        longer = extended(model, inputs, out.sequences[:, length : length + step])
        with zoo.oracle(adapter, CUTS[plan], visual, real, [zoo.CLIP_TOKENS] * 2), torch.no_grad():
            wanted = model(**longer).logits[:, -1]
        torch.testing.assert_close(out.logits[step], wanted, **TOLERANCE)


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
