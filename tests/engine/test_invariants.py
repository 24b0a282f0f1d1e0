# SPDX-License-Identifier: Apache-2.0
"""The invariants of the design, over families x attention backends x batches."""

from __future__ import annotations

import contextlib
import copy

import pytest
import tiny
import torch
from oracles import (
    GREEDY,
    PLANS,
    ROWWISE,
    TOKEN_TYPES,
    TOLERANCE,
    alone,
    extended,
    generate,
    language_model,
    masked_oracle,
    positions,
    visual_and_real,
)

import vtoken

BATCHES = [(1,), (1, 2, 0)]
FAMILIES = list(tiny.BUILDERS)
MASKABLE = [family for family in FAMILIES if family not in tiny.HYBRID]
BOTH = ("inside", "both")


def cases(families, plans=PLANS):
    """(family, plan): every plan on the core families, the two that cut at layers on the others."""
    return pytest.mark.parametrize(
        ("family", "plan"), [(f, p) for f in families for p in plans if f in tiny.CORE or p in BOTH]
    )


every_family = pytest.mark.parametrize("family", FAMILIES)
every_case = cases(FAMILIES)
maskable_case = cases(MASKABLE)
every_attention = pytest.mark.parametrize("attn", ["eager", "sdpa"])
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
    for reducer in vtoken.list_reducers() if family in tiny.CORE else ("random", "fopru"):
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


@maskable_case
@every_batch
@every_attention
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
        longer = extended(model, inputs, out.sequences[:, length : length + step])
        with masked_oracle(model, reducer, visual, real), torch.no_grad():
            wanted = model(**longer).logits[:, -1]
        torch.testing.assert_close(out.logits[step], wanted, **TOLERANCE)
        torch.testing.assert_close(hidden.logits[step], wanted, **TOLERANCE)


@every_case
@every_attention
def test_batch_equals_alone(family, attn, plan):
    batch = (1, 2, 0)
    model, inputs = tiny.make(family, batch, attn=attn)
    with vtoken.reduce(model, PLANS[plan]), torch.no_grad():
        together = model(**inputs).logits
        ids = generate(model, inputs)[:, -6:]
        for row in range(3):
            single = alone(inputs, row, batch)
            logits = model(**single).logits
            torch.testing.assert_close(together[row : row + 1, -logits.shape[1] :], logits, **TOLERANCE)
            assert torch.equal(generate(model, single)[:, -6:], ids[row : row + 1])


def longer_prompt(inputs, ids):
    """Token-wise arguments of a prompt that goes on after the first one, in which a second image is of type 1 again."""
    out = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    length = inputs["input_ids"].shape[1]
    out["attention_mask"][:, :length] = inputs["attention_mask"]
    for name in TOKEN_TYPES & inputs.keys():
        out[name] = (ids == tiny.IMAGE_ID).to(inputs[name].dtype) * int(inputs[name].any())
    return out


@every_case
def test_cache_equals_no_cache(family, plan):
    model, inputs = tiny.make(family, (1, 2))
    with vtoken.reduce(model, PLANS[plan]):
        assert torch.equal(generate(model, inputs), generate(model, inputs, use_cache=False))


@every_case
def test_beam_search_and_return_sequences(family, plan):
    model, inputs = tiny.make(family, (1, 2))
    with vtoken.reduce(model, PLANS[plan]):
        assert torch.equal(generate(model, inputs, num_beams=3), generate(model, inputs, num_beams=3, use_cache=False))
        single = generate(model, inputs)
        many = generate(model, inputs, num_return_sequences=2, do_sample=True, top_k=1)
    assert torch.equal(many[0::2], single)
    assert torch.equal(many[1::2], single)


@pytest.mark.parametrize("batch", [(1,), (1, 2)], ids=str)
@cases([family for family in FAMILIES if family not in (*tiny.SLIDING, *tiny.PREFIX, *tiny.BROKEN_CACHES)])
def test_second_turn_on_the_pruned_cache(family, plan, batch):
    """Later text cannot change earlier states (causal), so both runs choose the same tokens."""
    model, inputs = tiny.make(family, batch)
    with vtoken.reduce(model, PLANS[plan]):
        first = generate(model, inputs, 4, return_dict_in_generate=True)
        extra = torch.randint(3, 180, (len(batch), 5), generator=torch.Generator().manual_seed(3))
        turn = longer_prompt(inputs, torch.cat([first.sequences, extra], 1))
        cached = generate(model, turn, 5, past_key_values=copy.deepcopy(first.past_key_values))
        fresh = generate(model, {**inputs, **turn}, 5)
    assert torch.equal(cached, fresh)


@cases([family for family in MASKABLE if family not in tiny.SLIDING])
def test_a_second_image_on_the_pruned_cache(family, plan):
    """Turn two brings a picture: the dropped run equals the hidden one, step by step."""
    model, inputs = tiny.make(family, (1,))
    start = positions(model, inputs)
    turn = longer_prompt(inputs, torch.cat([inputs["input_ids"]] * 2, 1))
    length = inputs["input_ids"].shape[1]
    second = {name: value[:, length:] for name, value in turn.items() if name != "attention_mask"}
    second |= {name: value for name, value in inputs.items() if name not in ROWWISE}
    second["pixel_values"] = inputs["pixel_values"].flip(-1)
    second |= {"attention_mask": turn["attention_mask"], "position_ids": start + start.max() + 1}
    answers = []
    for backend in ("drop", "mask"):
        with vtoken.reduce(model, PLANS[plan], backend=backend), torch.no_grad():
            cache = model(**inputs, position_ids=start, use_cache=True).past_key_values
            logits = [model(**second, past_key_values=cache).logits[:, -1]]
            for step in range(1, 4):
                mask = torch.ones(1, 2 * length + step, dtype=torch.long)
                at = second["position_ids"][..., -1:] + step
                token = torch.full((1, 1), 20 + step)
                out = model(input_ids=token, attention_mask=mask, position_ids=at, past_key_values=cache)
                logits.append(out.logits[:, -1])
            answers.append(torch.stack(logits))
    torch.testing.assert_close(answers[0], answers[1], **TOLERANCE)


@pytest.mark.parametrize("what", ["several turns", "static cache"])
@pytest.mark.parametrize("family", tiny.SLIDING)
def test_sliding_windows_are_exact_or_refused(family, what, record_property):
    """Beyond the window, a first prompt with a dynamic cache is exact (tests above); the rest is refused."""
    record_property("refused", what)
    model, inputs = tiny.make(family, (1,))
    with vtoken.reduce(model, PLANS["both"]):
        first = generate(model, inputs, 4, return_dict_in_generate=True)
        turn = longer_prompt(inputs, torch.cat([first.sequences, first.sequences[:, :3]], 1))
        later = {
            "several turns": (turn, {"past_key_values": first.past_key_values}),
            "static cache": (inputs, {"cache_implementation": "static"}),
        }
        arguments, options = later[what]
        with pytest.raises(NotImplementedError, match="sliding window of 14 tokens"):
            generate(model, arguments, **options)


@pytest.mark.parametrize("family", MASKABLE)
def test_labels_give_the_loss_of_the_shortened_sequence(family):
    model, inputs = tiny.make(family, (2,))
    labels = inputs["input_ids"].masked_fill(visual_and_real(inputs)[0], -100)
    # the token behind an image is predicted from the nearest kept position: compare where that is the same
    first_text = (visual_and_real(inputs)[0].nonzero()[:, 1] + 1).clamp(max=labels.shape[1] - 1)
    labels[0, first_text] = -100
    losses = []
    for backend in ("drop", "mask"):
        with vtoken.reduce(model, PLANS["both"], backend=backend):
            out = model(**inputs, labels=labels)
            assert out.logits.shape[1] == labels.shape[1]
            losses.append(out.loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@every_family
def test_compact_positions_renumber(family, record_property):
    """Compact ids equal a run on the kept rows alone with ids from the first one, or are refused with a sentence."""
    model, inputs = tiny.make(family, (1,))
    seen = []

    def record(module, args, kwargs):
        seen.append(kwargs["position_ids"].clone())

    handle = language_model(model).register_forward_pre_hook(record, with_kwargs=True)
    generate(model, inputs, 1)
    handle.remove()
    mrope = seen[0].dim() == 3
    if mrope:
        record_property("refused", "compact positions")
    expected = pytest.raises(NotImplementedError, match="M-RoPE") if mrope else contextlib.nullcontext()
    with vtoken.reduce(model, PLANS["before"], positions="compact"), expected:
        handle = language_model(model).register_forward_pre_hook(record, with_kwargs=True)
        generate(model, inputs, 3)
        handle.remove()
    if not mrope:
        whole, prefill, step = seen[:3]
        assert torch.equal(prefill, whole[:, : prefill.shape[1]])
        assert torch.equal(step, prefill[:, -1:] + 1)


@cases([family for family in FAMILIES if family not in (*tiny.SLIDING, *tiny.BROKEN_CACHES)])
def test_static_cache_gives_the_same_ids(family, plan):
    model, inputs = tiny.make(family, (1, 2))
    with vtoken.reduce(model, PLANS[plan]):
        assert torch.equal(generate(model, inputs), generate(model, inputs, cache_implementation="static"))


@pytest.mark.parametrize("family", [family for family in MASKABLE if family not in tiny.SLIDING])
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


@pytest.mark.parametrize("family", tiny.HYBRID)
def test_hiding_is_refused_where_it_is_not_dropping(family):
    model, _ = tiny.make(family, (1,))
    with pytest.raises(NotImplementedError, match="recurrent layers"):
        vtoken.wrap(model, "random", keep=0.5, backend="mask")


@pytest.mark.parametrize("name", ["fopru", "idpruner"])
def test_positions_of_the_paper(name):
    """FoPru renumbers, IDPruner keeps: "paper" follows the method."""
    model, inputs = tiny.make("llava", (1,))
    logits = {}
    for positions_ in ("keep", "compact", "paper"):
        with vtoken.reduce(model, name, keep=0.25, positions=positions_), torch.no_grad():
            logits[positions_] = model(**inputs).logits
    assert not torch.equal(logits["keep"], logits["compact"])
    assert torch.equal(logits["paper"], logits["compact" if name == "fopru" else "keep"])


@pytest.mark.parametrize("family", tiny.CORE)
def test_bfloat16_runs(family):
    model, inputs = tiny.make(family, (1, 2))
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
