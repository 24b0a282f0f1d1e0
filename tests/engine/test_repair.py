# SPDX-License-Identifier: Apache-2.0
"""``repair=True`` against stock models on whole sequences, whose layers are given the added logits, one by one."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import pytest
import tiny
import torch
from cases import pairs
from oracles import (
    PLANS,
    TOLERANCE,
    alone,
    extended,
    generate,
    kept_columns,
    language_model,
    runs_of,
    visual_and_real,
)
from torch.nn.functional import cosine_similarity

import vtoken

FAMILIES = [family for family in tiny.BUILDERS if family not in tiny.HYBRID]
REPAIRED = {name: dataclasses.replace(plan, repair=True) for name, plan in PLANS.items()}
BATCH = (1, 2, 0)

every_family = pytest.mark.parametrize("family", FAMILIES)
every_core = pytest.mark.parametrize("family", tiny.CORE)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def radians(model, layer):
    """(F,) rotary frequencies of a layer, by their formula."""
    config = language_model(model).config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    rope = rope if "rope_theta" in rope else rope[config.layer_types[layer]]
    width = int(width * rope.get("partial_rotary_factor", 1.0))
    return torch.tensor([rope["rope_theta"] ** (-2 * i / width) for i in range(width // 2)])


def count(states, runs, before, now, counts, newline):
    """Add what goes to the most similar of what stays, token by token, for one row; newlines stand for themselves."""
    counts = list(counts)
    for run in runs:
        patches = [int(t) for t in run if not newline[t]]
        stays = [t for t in patches if now[t]]
        for token in patches:
            if before[token] and not now[token] and stays:
                similar = [float(cosine_similarity(states[token], states[other], dim=0)) for other in stays]
                counts[stays[similar.index(max(similar))]] += counts[token]
    return counts


@contextlib.contextmanager
def repair_oracle(model, visual, real, kept, prompt):
    """The stock model on the full sequence; ``kept`` as `kept_columns` gives it, ``prompt`` tokens long."""
    starts = dict(kept)
    state = {"now": real, "counts": [[1.0] * prompt for _ in real]}

    def added(total, frequencies):
        """(B, total, total) what is added to each logit."""
        ids = state["ids"]
        bias = torch.zeros(len(real), total, total)
        for row in range(len(real)):
            for key in (visual[row] & state["now"][row]).nonzero()[:, 0].tolist():
                bias[row, :, key] = math.log(state["counts"][row][key])
                apart = ids[row, :prompt] - ids[row, key]
                bias[row, :prompt, key] += (2 - (apart[:, None] * frequencies).cos().mean(1)).log()
        return bias

    def note(module, args, kwargs):
        length = kwargs["inputs_embeds"].shape[1]
        ids = kwargs.get("position_ids")
        ids = torch.arange(length)[None] if ids is None else ids
        ids = ids if ids.dim() == 2 else ids[len(ids) - 3]
        state["ids"] = ids.expand(len(real), -1)
        separator = getattr(model.model, "image_newline", None)
        embeds = kwargs["inputs_embeds"]
        state["newline"] = (embeds == (torch.nan if separator is None else separator)).all(-1)

    def hook(index, args, kwargs):
        hidden = args[0]
        if index in starts:
            now = starts[index]
            for row, runs in enumerate(runs_of(visual)):
                before, newline = state["now"][row], state["newline"][row]
                state["counts"][row] = count(hidden[row], runs, before, now[row], state["counts"][row], newline)
            state["now"] = now
        total = hidden.shape[1]
        cut = bool((state["now"] != real).any())
        bias = added(total, radians(model, index)) if cut else torch.zeros(1, total, total)
        base = kwargs.get("attention_mask")
        base = torch.ones(total, total).tril().bool()[None, None] if base is None else base
        base = base if base.dtype == torch.bool else base == 0
        valid = torch.cat([state["now"], state["now"].new_ones(len(hidden), total - prompt)], 1)
        allow = base.expand(len(hidden), -1, -1, -1) & valid[:, None, None]
        mask = torch.where(allow, bias[:, None], torch.finfo(hidden.dtype).min)
        return args, {**kwargs, "attention_mask": mask}

    language = language_model(model)
    with contextlib.ExitStack() as stack:
        stack.callback(language.register_forward_pre_hook(note, with_kwargs=True).remove)
        for index, layer in enumerate(language.layers):
            add = layer.register_forward_pre_hook(
                lambda module, args, kwargs, index=index: hook(index, args, kwargs), with_kwargs=True
            )
            stack.callback(add.remove)
        yield


@every_family
@pytest.mark.parametrize(("attn", "plan"), [("eager", "before"), ("sdpa", "both")])
def test_every_step_equals_the_stock_model_with_added_logits(family, attn, plan):
    model, inputs = tiny.make(family, BATCH, attn=attn)
    visual, real = visual_and_real(inputs)
    with vtoken.reduce(model, REPAIRED[plan]):
        out = generate(model, inputs, 3, output_logits=True, return_dict_in_generate=True)
        kept = vtoken.stats(model).kept
    with vtoken.reduce(model, REPAIRED[plan], backend="mask"):
        assert torch.equal(generate(model, inputs, 3), out.sequences)
    with vtoken.reduce(model, PLANS[plan]), torch.no_grad():
        unrepaired = model(**inputs).logits[:, -1]
    length = inputs["input_ids"].shape[1]
    columns = kept_columns(visual, real, kept)
    for step in range(3):
        longer = extended(model, inputs, out.sequences[:, length : length + step])
        with repair_oracle(model, visual, real, columns, length), torch.no_grad():
            wanted = model(**longer).logits[:, -1]
        torch.testing.assert_close(out.logits[step], wanted, **TOLERANCE)
    assert not torch.allclose(out.logits[0][:2], unrepaired[:2], **TOLERANCE)


@every_family
@pytest.mark.parametrize("plan", ["before", "both"])
def test_a_batch_equals_its_rows_alone(family, plan):
    model, inputs = tiny.make(family, BATCH)
    with vtoken.reduce(model, REPAIRED[plan]), torch.no_grad():
        together = model(**inputs).logits
        for row in range(len(BATCH)):
            logits = model(**alone(inputs, row, BATCH)).logits
            torch.testing.assert_close(together[row : row + 1, -logits.shape[1] :], logits, **TOLERANCE)


@every_core
@pytest.mark.parametrize("plan", ["before", "both"])
def test_caches_of_every_kind_and_beams_repair_the_same(family, plan):
    model, inputs = tiny.make(family, BATCH)
    with vtoken.reduce(model, REPAIRED[plan]):
        ids = generate(model, inputs, 5)
        assert torch.equal(generate(model, inputs, 5, cache_implementation="static", disable_compile=True), ids)
        assert torch.equal(generate(model, inputs, 5, use_cache=False), ids)
        beams = generate(model, inputs, 5, num_beams=3)
        single = [generate(model, alone(inputs, row, BATCH), 5, num_beams=3) for row in range(len(BATCH))]
    for row, one in enumerate(single):
        assert torch.equal(beams[row, -5:], one[0, -5:])


@pytest.mark.parametrize("family", [family for family in tiny.CORE if "qwen" not in family])  # positions are ours
def test_a_second_turn_goes_on_with_what_the_first_repaired(family):
    """A turn of text on the pruned cache, in one piece and token by token."""
    model, inputs = tiny.make(family, (1,))
    more = torch.randint(3, 180, (1, 6), generator=torch.Generator().manual_seed(5))
    length = inputs["input_ids"].shape[1]
    with vtoken.reduce(model, REPAIRED["both"]), torch.no_grad():
        whole, single = (model(**inputs, use_cache=True).past_key_values for _ in range(2))
        mask = torch.ones(1, length + 6, dtype=torch.long)
        logits = model(input_ids=more, attention_mask=mask, past_key_values=whole).logits
        for at in range(6):
            step = model(
                input_ids=more[:, at : at + 1], attention_mask=mask[:, : length + at + 1], past_key_values=single
            ).logits
            torch.testing.assert_close(logits[:, at], step[:, 0], **TOLERANCE)


def test_a_stock_model_does_not_go_on_with_a_repaired_cache():
    model, inputs = tiny.make("llava", (1,))
    with vtoken.reduce(model, REPAIRED["before"]), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="pruned by vtoken"):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)


@pytest.mark.parametrize(("family", "name"), pairs())
def test_every_reducer_repairs_or_says_why_not(family, name):
    """Dropping equals hiding, and the answer differs from the one without; or one sentence at ``wrap``."""
    model, inputs = tiny.make(family, (1, 2))
    reducer = vtoken.get_reducer(name)
    reducer = dataclasses.replace(reducer, **({"keep": 0.3} if hasattr(reducer, "keep") else {}))
    if name in CANNOT:
        with pytest.raises(NotImplementedError, match="leave repair out"):
            vtoken.wrap(model, reducer, repair=True)
        return
    with torch.no_grad():
        with vtoken.reduce(model, reducer):
            without = model(**inputs).logits[:, -1]
        with vtoken.reduce(model, reducer, repair=True):
            repaired = model(**inputs).logits[:, -1]
            dropped = bool((~vtoken.stats(model).kept[-1][1]).any())
        with vtoken.reduce(model, reducer, repair=True, backend="mask"):
            torch.testing.assert_close(model(**inputs).logits[:, -1], repaired, **TOLERANCE)
    assert torch.equal(without, repaired) != (dropped and name not in GONE)


CANNOT = {"ima", "ipcv", "pixelprune", "tower-prune", "yopo"}
GONE = {"vtw", "dyvte"}
"""They leave no token of a picture, or none here."""


def test_wrong_settings_are_refused_in_a_sentence():
    model, _ = tiny.make("llava", (1,))
    with pytest.raises(ValueError, match=r"repair='yes'.*neither True nor False"):
        vtoken.wrap(model, "fopru", repair="yes")
    with pytest.raises(NotImplementedError, match="'chain' works otherwise"):
        vtoken.wrap(model, vtoken.Chain([vtoken.TowerPrune(keep=0.5), vtoken.FoPru(keep=0.2)], repair=True))
    language_model(model).config._attn_implementation = "flash_attention_2"
    with pytest.raises(NotImplementedError, match="attn_implementation='flash_attention_2'"):
        vtoken.wrap(model, "fopru", repair=True)


def test_the_option_travels_with_a_reducer():
    plain, repaired = vtoken.get_reducer("fopru", keep=0.2), vtoken.get_reducer("fopru", keep=0.2, repair=True)
    assert "repair" not in plain.config()
    assert repaired.config()["repair"] is True
    assert vtoken.get_reducer(repaired.config()) == repaired
    chain = vtoken.Chain([vtoken.FoPru(keep=0.5), vtoken.FastV(keep=0.2)], repair=True)
    again = vtoken.get_reducer(chain.config())
    assert again == chain
    assert str(again).endswith("repair=True")
    assert vtoken.Chain([repaired]).repair
