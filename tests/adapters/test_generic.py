# SPDX-License-Identifier: Apache-2.0
"""The adapter by convention, on a tiny model of every type that it serves."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
import transformers as tf
import zoo
from oracles import PLANS, TOLERANCE, TestReducer, generate, visual_and_real
from transformers import CONFIG_MAPPING

import vtoken
from vtoken.adapters import adapter_for, families
from vtoken.adapters.generic import GenericAdapter
from vtoken.engine.tower import VisionRecord
from vtoken.reducers.base import Reducer

BATCH = (1, 2, 0)
TYPES = Path(__file__).parents[2] / "benchmarks" / "results" / "types.json"
REFUSED = json.loads(TYPES.read_text(encoding="utf-8"))["refused"] if TYPES.is_file() else {}
FAMILIES = [family for family in zoo.BUILDERS if family in CONFIG_MAPPING]  # of the installed transformers
HYBRID = [family for family in tiny.HYBRID if family in CONFIG_MAPPING]  # with an adapter of their own
every_family = pytest.mark.parametrize("family", FAMILIES)
CUTS = {"before": PLANS["before"], "between": TestReducer(before=0.7, at=((1, 0.6), (2, 0.4)))}
STEPS = {"output_logits": True, "return_dict_in_generate": True}


def plans_of(families: Iterable[str]) -> pytest.MarkDecorator:
    """Each family with each plan that it can follow."""
    pairs = [(family, plan) for family in families for plan in CUTS if plan == "before" or family not in zoo.SHORT]
    return pytest.mark.parametrize(("family", "plan"), pairs, ids=["-".join(pair) for pair in pairs])


def widest(family: str) -> str:
    """The plan that asks most of a family."""
    return "before" if family in zoo.SHORT else "between"


def reduced(family: str, model, plan: str):
    return vtoken.reduce(model, CUTS[plan], **zoo.positions(family))


@pytest.fixture
def refused(record_property):
    """``refused(column, match)``: what is tried inside raises a sentence, which stands in the table for a column."""

    @contextlib.contextmanager
    def expect(column: str, match: str):
        with pytest.raises((NotImplementedError, ValueError, TypeError), match=match) as caught:
            yield
        record_property("refused", column)
        record_property("sentence", str(caught.value))

    return expect


@dataclass(frozen=True)
class Look(Reducer):
    """Reads a row of a layer that ran, cuts nothing."""

    name = "look"
    layer: int

    def __post_init__(self):
        object.__setattr__(self, "seen", {})

    def taps(self, depth):
        return {self.layer: "last"}

    def layers(self, depth):
        return (depth,)

    def at_layer(self, layer, ctx):
        self.seen["rows"] = ctx.attention[self.layer].probabilities


class Peek(Look):
    """Reads a row of a layer that comes next."""

    def taps(self, depth):
        return {}

    def peeks(self, depth):
        return (self.layer,)

    def layers(self, depth):
        return (self.layer,)

    def at_layer(self, layer, ctx):
        self.seen["rows"] = ctx.peek("last").probabilities


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_the_zoo_holds_every_type_that_is_served():
    served = {name for name, adapter in families().items() if issubclass(adapter, GenericAdapter)}
    assert served == set(zoo.BUILDERS)


@pytest.mark.parametrize("name", zoo.unserved())
def test_the_rest_is_refused_with_the_reason_that_the_table_gives(name, request, record_property):
    if name.startswith("kosmos") and tiny.VERSION > (5, 23):
        pytest.skip("the table is of transformers 5.23; since 5.24 the class encodes pictures by a method")
    sentence = zoo.refusal(name)
    assert sentence.count(". ") == 0
    assert sentence.endswith(".")
    if not request.config.getoption("types_report") and name in REFUSED:
        assert sentence == REFUSED[name]
    record_property("unserved", name)
    record_property("sentence", sentence)


@pytest.mark.skipif(tiny.VERSION != (5, 23), reason="the table is of transformers 5.23")
def test_the_table_has_a_row_for_every_type():
    assert sorted(REFUSED) == zoo.unserved()


@pytest.mark.parametrize("family", zoo.PICTURED)
def test_encoder_attention_behind_a_q_former_is_refused(family, refused):
    """In ``generate`` too, which encodes past what watches the tower."""
    case = zoo.make(family, zoo.batch(family, 1, 2))
    with vtoken.reduce(case.model, "visionzip", keep=0.5):
        for run in (lambda: case.model(**case.inputs), lambda: generate(case.model, case.inputs, 1)):
            with refused("encoder attention", "queries of a Q-Former"):
                run()


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
    case = zoo.make(family, zoo.batch(family, *BATCH))
    model, inputs = case.model, case.inputs
    assert isinstance(adapter_for(model), GenericAdapter)
    with torch.no_grad():
        logits, ids = model(**inputs).logits, generate(model, inputs, 4)
        with vtoken.reduce(model, "random", keep=1.0):
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(generate(model, inputs, 4), ids)
        assert torch.equal(model(**inputs).logits, logits)


@plans_of((*FAMILIES, *HYBRID))
def test_dropping_equals_hiding_at_every_decode_step(family, plan):
    case = zoo.make(family, zoo.batch(family, *BATCH))
    model, inputs = case.model, case.inputs
    adapter, (visual, real) = adapter_for(model), visual_and_real(inputs)
    with torch.no_grad():
        whole = model(**inputs).logits[:, -1]
        tolerance = {"atol": 3e-4, "rtol": 1e-3} if family in zoo.ROUNDED else TOLERANCE
        with reduced(family, model, plan):
            out = generate(model, inputs, 3, **STEPS)
            assert vtoken.stats(model).tokens_per_layer < vtoken.stats(model).tokens_in
        assert (out.logits[0] - whole)[:2].abs().max() > 100 * TOLERANCE["atol"]  # or the oracle shows nothing
        length = inputs["input_ids"].shape[1]
        for step in range(3):
            longer = zoo.longer(model, inputs, out.sequences[:, length : length + step])
            with zoo.oracle(adapter, CUTS[plan], visual, real):
                wanted = model(**longer).logits[:, -1]
            torch.testing.assert_close(out.logits[step], wanted, **tolerance)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family in zoo.SHORT])
def test_cuts_between_layers_are_refused(family, refused):
    model = zoo.make(family, (1,)).model
    for reducer in ("vtw", CUTS["between"]):
        with refused("drop between layers = mask", "as if the prompt were a shorter one, .* between its layers"):
            vtoken.wrap(model, reducer, **zoo.positions(family))
    with pytest.raises(NotImplementedError, match="use backend='drop'"):
        vtoken.wrap(model, CUTS["before"], backend="mask", **zoo.positions(family))
    assert vtoken.unwrap(vtoken.wrap(model, "random", keep=1.0)) is model


@pytest.mark.parametrize("family", [family for family in FAMILIES if family in zoo.COMPACT])
def test_kept_positions_are_refused(family, refused):
    with refused("drop before = mask", "pass positions='compact'"):
        vtoken.wrap(zoo.make(family, (1,)).model, CUTS["before"])


@plans_of(FAMILIES)
def test_cache_equals_no_cache(family, plan):
    case = zoo.make(family, zoo.batch(family, *BATCH))
    model, inputs = case.model, case.inputs
    with reduced(family, model, plan):
        assert torch.equal(generate(model, inputs, 4), generate(model, inputs, 4, use_cache=False))


@every_family
def test_static_cache_gives_the_same_ids(family, refused):
    case = zoo.make(family, zoo.batch(family, 1, 2))
    with reduced(family, case.model, widest(family)):
        if family in zoo.DYNAMIC:
            with refused("static cache", zoo.DYNAMIC[family]):
                generate(case.model, case.inputs, cache_implementation="static")
            return
        ids = generate(case.model, case.inputs)
        assert torch.equal(generate(case.model, case.inputs, cache_implementation="static"), ids)


@every_family
def test_second_turn_on_the_pruned_cache(family, refused):
    """Later text cannot change earlier states (causal), so both runs choose the same tokens."""
    if family in zoo.PICTURED:
        pytest.skip("generate() takes a picture with every call")
    case = zoo.make(family, zoo.batch(family, 1, 2))
    model, inputs = case.model, case.inputs
    with reduced(family, model, widest(family)):
        first = generate(model, inputs, 2, return_dict_in_generate=True)
        extra = torch.randint(3, 99, (len(case.counts), 4), generator=torch.Generator().manual_seed(3))
        turn = zoo.next_turn(inputs, torch.cat([first.sequences, extra], 1))
        if family in zoo.ONE_TURN:
            with refused("several turns", zoo.ONE_TURN[family]):
                generate(model, turn, 3, past_key_values=first.past_key_values)
            return
        cached = generate(model, turn, 3, past_key_values=first.past_key_values, **STEPS)
        fresh = generate(model, {**inputs, **turn}, 3, **STEPS)
    torch.testing.assert_close(cached.logits[0], fresh.logits[0], atol=1e-3, rtol=1e-3)
    assert torch.equal(cached.sequences, fresh.sequences)


@every_family
def test_beam_search_and_return_sequences(family):
    if family in zoo.NO_BEAMS:
        pytest.skip("generate() of the unwrapped model raises")
    case = zoo.make(family, (1,) if family in zoo.MIXED else zoo.batch(family, 1, 2))
    model, inputs = case.model, case.inputs
    with reduced(family, model, widest(family)):
        beams = generate(model, inputs, 3, num_beams=2)
        assert torch.equal(beams, generate(model, inputs, 3, num_beams=2, use_cache=False))


@pytest.mark.parametrize("family", [*FAMILIES, *HYBRID])
def test_decoder_rows_equal_eager(family, refused):
    case = zoo.make(family, zoo.batch(family, 1, 2))
    model, adapter = case.model, adapter_for(case.model)
    layer = next(i for i, one in enumerate(adapter.layers) if i and adapter.has_attention(one))
    spy = Look(layer)
    if family in zoo.UNREADABLE:
        with refused("decoder attention", "cannot read it: use a reducer that reads no decoder attention"):
            vtoken.wrap(model, spy, **zoo.positions(family))
        return
    with vtoken.reduce(model, spy, **zoo.positions(family)), torch.no_grad():
        model(**case.inputs)
    wanted = zoo.eager_rows(case, adapter.attention(adapter.layers[layer]))
    torch.testing.assert_close(spy.seen["rows"][:, :, 0], wanted[:, :, -1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in {*zoo.UNREADABLE, *zoo.SHORT}])
def test_decoder_rows_to_come_equal_eager(family, refused):
    case = zoo.make(family, zoo.batch(family, 1, 2))
    model, adapter = case.model, adapter_for(case.model)
    layer = next(i for i, one in enumerate(adapter.layers) if i and adapter.has_attention(one))
    peek = Peek(layer)
    if family in zoo.NO_PEEK:
        with refused("decoder attention", "attention which is yet to come"):
            vtoken.wrap(model, peek)
        return
    with vtoken.reduce(model, peek), torch.no_grad():
        model(**case.inputs)
    wanted = zoo.eager_rows(case, adapter.attention(adapter.layers[layer]))
    torch.testing.assert_close(peek.seen["rows"][:, :, 0], wanted[:, :, -1], atol=1e-5, rtol=1e-4)


@plans_of(zoo.CLIPS)
def test_clips(family, plan):
    """A clip is one item, also where its steps are apart and stand behind placeholders of pictures."""
    case = zoo.clips(family)
    model, inputs = case.model, case.inputs
    adapter, (visual, real) = adapter_for(model), visual_and_real(inputs)
    with reduced(family, model, plan):
        out = generate(model, inputs, 2, **STEPS)
        assert vtoken.stats(model).tokens_in == 2 * zoo.CLIP_TOKENS
    length = inputs["input_ids"].shape[1]
    for step in range(2):
        longer = zoo.longer(model, inputs, out.sequences[:, length : length + step])
        with zoo.oracle(adapter, CUTS[plan], visual, real, [zoo.CLIP_TOKENS] * 2), torch.no_grad():
            wanted = model(**longer).logits[:, -1]
        torch.testing.assert_close(out.logits[step], wanted, **TOLERANCE)


@plans_of(FAMILIES)
def test_batch_equals_alone(family, plan):
    case = zoo.make(family, zoo.batch(family, *BATCH))
    model, inputs = case.model, case.inputs
    if family in zoo.UNEQUAL:
        pytest.skip("the unwrapped model's rows depend on their padding")
    with reduced(family, model, plan), torch.no_grad():
        together = model(**inputs).logits
        for row, pictures in enumerate(case.counts):
            if not pictures and family in zoo.PICTURED:
                continue
            logits = model(**case.alone(row)).logits
            torch.testing.assert_close(together[row : row + 1, -logits.shape[1] :], logits, **TOLERANCE)
