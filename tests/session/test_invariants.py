# SPDX-License-Identifier: Apache-2.0
"""The invariants of the design, over families x attention backends x batches."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from oracles import (
    GREEDY,
    PLANS,
    TOLERANCE,
    alone,
    extended,
    generate,
    masked_oracle,
    positions,
    visual_and_real,
)

import vtoken

FAMILIES = list(tiny.BUILDERS)
BATCHES = [(1,), (2,), (1, 2, 0)]

every_family = pytest.mark.parametrize("family", FAMILIES)
every_attention = pytest.mark.parametrize("attn", ["eager", "sdpa"])
every_plan = pytest.mark.parametrize("plan", PLANS)
every_batch = pytest.mark.parametrize("batch", BATCHES, ids=str)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def trace(model):
    """Everything that a wrap may leave behind."""
    modules = dict(model.named_modules())
    return {
        name: (
            sorted(vars(module)),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._forward_hooks_with_kwargs),
            len(module._forward_pre_hooks_with_kwargs),
            len(module._forward_hooks_always_called),
        )
        for name, module in modules.items()
    }


@every_batch
@every_attention
@every_family
def test_keep_all_is_bit_identical_and_unwrap_leaves_no_trace(family, attn, batch):
    model, inputs = tiny.make(family, batch, attn=attn)
    logits, ids = model(**inputs).logits, generate(model, inputs)
    before = trace(model)  # after a first run: transformers installs hooks of its own lazily
    for reducer in vtoken.list_reducers():
        if not hasattr(vtoken.get_reducer(reducer), "keep"):
            continue
        vtoken.wrap(model, reducer, keep=1.0)
        assert torch.equal(model(**inputs).logits, logits), reducer
        vtoken.unwrap(model)
    vtoken.wrap(model, "random", keep=1.0)
    assert torch.equal(generate(model, inputs), ids)
    vtoken.unwrap(model)
    with vtoken.reduce(model, PLANS["both"]):
        assert not torch.equal(model(**inputs).logits, logits)
    assert trace(model) == before
    assert torch.equal(model(**inputs).logits, logits)


@every_plan
@every_batch
@every_attention
@every_family
def test_dropping_equals_hiding_at_every_decode_step(family, attn, batch, plan):
    """Prefill and cached decode against the stock model with explicit masks, and against backend="mask"."""
    model, inputs = tiny.make(family, batch, attn=attn)
    reducer = PLANS[plan]
    visual, real = visual_and_real(inputs)
    steps = {"output_logits": True, "return_dict_in_generate": True}
    with vtoken.reduce(model, reducer):
        out = generate(model, inputs, 4, **steps)
    with vtoken.reduce(model, reducer, backend="mask"):
        hidden = generate(model, inputs, 4, **steps)
    assert torch.equal(out.sequences, hidden.sequences)
    length = inputs["input_ids"].shape[1]
    for step in range(4):
        longer = extended(inputs, out.sequences[:, length : length + step])
        longer["position_ids"] = positions(model, longer)
        with masked_oracle(model, reducer, visual, real), torch.no_grad():
            wanted = model(**longer).logits[:, -1]
        torch.testing.assert_close(out.logits[step], wanted, **TOLERANCE)
        torch.testing.assert_close(hidden.logits[step], wanted, **TOLERANCE)


@every_plan
@every_attention
@every_family
def test_batch_equals_alone(family, attn, plan):
    batch = (1, 2, 0)
    model, inputs = tiny.make(family, batch, attn=attn)
    with vtoken.reduce(model, PLANS[plan]), torch.no_grad():
        together = model(**inputs).logits
        ids = generate(model, inputs)[:, -6:]
        for row, images in enumerate([slice(0, 1), slice(1, 3), slice(3, 3)]):
            single = alone(inputs, row, images)
            if images.start == images.stop:
                single = {name: single[name] for name in ("input_ids", "attention_mask")}
            logits = model(**single).logits
            torch.testing.assert_close(together[row : row + 1, -logits.shape[1] :], logits, **TOLERANCE)
            assert torch.equal(generate(model, single)[:, -6:], ids[row : row + 1])


@every_plan
@every_family
def test_cache_equals_no_cache(family, plan):
    model, inputs = tiny.make(family, (1, 2))
    with vtoken.reduce(model, PLANS[plan]):
        assert torch.equal(generate(model, inputs), generate(model, inputs, use_cache=False))


@every_plan
@every_family
def test_beam_search_and_return_sequences(family, plan):
    model, inputs = tiny.make(family, (1, 2))
    with vtoken.reduce(model, PLANS[plan]):
        assert torch.equal(generate(model, inputs, num_beams=3), generate(model, inputs, num_beams=3, use_cache=False))
        single = generate(model, inputs)
        many = generate(model, inputs, num_return_sequences=2, do_sample=True, top_k=1)
    assert torch.equal(many[0::2], single)
    assert torch.equal(many[1::2], single)


@pytest.mark.parametrize("batch", [(1,), (1, 2)], ids=str)
@every_plan
@every_family
def test_second_turn_on_the_pruned_cache(family, plan, batch):
    """Later text cannot change earlier states (causal), so both runs choose the same tokens."""
    model, inputs = tiny.make(family, batch)
    with vtoken.reduce(model, PLANS[plan]):
        first = generate(model, inputs, 4, return_dict_in_generate=True)
        extra = torch.randint(3, 180, (len(batch), 5), generator=torch.Generator().manual_seed(3))
        turn = {
            "input_ids": torch.cat([first.sequences, extra], 1),
            "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(len(batch), 9, dtype=torch.long)], 1),
        }
        cached = generate(model, turn, 5, past_key_values=copy.deepcopy(first.past_key_values))
        fresh = generate(model, {**inputs, **turn}, 5)
    assert torch.equal(cached, fresh)


@every_plan
@every_family
def test_a_second_image_on_the_pruned_cache(family, plan):
    """Turn two brings a picture: the dropped run equals the hidden one, token by token."""
    model, inputs = tiny.make(family, (1,))
    visual, _ = visual_and_real(inputs)
    answers = []
    for backend in ("drop", "mask"):
        with vtoken.reduce(model, PLANS[plan], backend=backend):
            first = generate(model, inputs, 3, return_dict_in_generate=True)
            text = torch.randint(3, 180, (1, 4), generator=torch.Generator().manual_seed(5))
            image = torch.full((1, int(visual.sum())), tiny.IMAGE_ID)
            ids = torch.cat([first.sequences, text, image, text], 1)
            turn = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            turn["pixel_values"] = turn["pixel_values"].flip(-1)
            out = generate(
                model,
                turn,
                4,
                past_key_values=first.past_key_values,
                output_logits=True,
                return_dict_in_generate=True,
            )
            answers.append(torch.stack(out.logits))
    torch.testing.assert_close(answers[0], answers[1], **TOLERANCE)


@every_family
def test_labels_give_the_loss_of_the_shortened_sequence(family):
    model, inputs = tiny.make(family, (2,))
    labels = inputs["input_ids"].masked_fill(visual_and_real(inputs)[0], -100)
    losses = []
    for backend in ("drop", "mask"):
        with vtoken.reduce(model, PLANS["both"], backend=backend):
            out = model(**inputs, labels=labels)
            assert out.logits.shape[1] == labels.shape[1]
            losses.append(out.loss.item())
    # the token behind an image is predicted from the nearest kept position: compare where that is the same
    first_text = (visual_and_real(inputs)[0].nonzero()[:, 1] + 1).clamp(max=labels.shape[1] - 1)
    labels[0, first_text] = -100
    losses = []
    for backend in ("drop", "mask"):
        with vtoken.reduce(model, PLANS["both"], backend=backend):
            losses.append(model(**inputs, labels=labels).loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@every_family
def test_compact_positions_renumber(family):
    """Compact ids equal a run on the kept rows alone with ids from zero, in prefill and decode."""
    model, inputs = tiny.make(family, (1,))
    seen = []

    def record(module, args, kwargs):
        seen.append(kwargs["position_ids"].clone())

    with vtoken.reduce(model, PLANS["before"], positions="compact"):
        handle = model.model.language_model.register_forward_pre_hook(record, with_kwargs=True)
        generate(model, inputs, 3)
        handle.remove()
    assert torch.equal(seen[0], torch.arange(seen[0].shape[1])[None])


@every_family
def test_static_cache_gives_the_same_ids(family):
    model, inputs = tiny.make(family, (1, 2))
    for plan in PLANS.values():
        with vtoken.reduce(model, plan):
            assert torch.equal(generate(model, inputs), generate(model, inputs, cache_implementation="static"))


@every_family
def test_cache_reports_logical_and_stores_fewer(family):
    model, inputs = tiny.make(family, (1,))
    with vtoken.reduce(model, PLANS["inside"]), torch.no_grad():
        out = model(**inputs, use_cache=True)
        stats = vtoken.stats(model)
    cache, length = out.past_key_values, inputs["input_ids"].shape[1]
    assert cache.get_seq_length() == length
    stored = [layer.keys.shape[2] for layer in cache.layers]
    text = length - stats.tokens_in
    assert stored == [text + stats.tokens_in, *[text + stats.layers[1][1][0]] * 2, text]


def test_bfloat16_runs():
    model, inputs = tiny.make("llava", (1, 2))
    model.to(torch.bfloat16)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    with vtoken.reduce(model, "fopru", keep=0.5):
        assert generate(model, inputs).shape[1] == inputs["input_ids"].shape[1] + 6


def test_sampling_is_reproducible():
    model, inputs = tiny.make("llava", (1,))
    with vtoken.reduce(model, "random", keep=0.5):
        runs = []
        for _ in range(2):
            torch.manual_seed(0)
            runs.append(model.generate(**inputs, max_new_tokens=5, **{**GREEDY, "do_sample": True}))
    assert torch.equal(*runs)
