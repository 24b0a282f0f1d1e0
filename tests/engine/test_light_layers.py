# SPDX-License-Identifier: Apache-2.0
"""Light layers: what visual rows skip is exactly what is missing, and it is really skipped."""

from __future__ import annotations

import copy
import functools

import flash
import pytest
import tiny
import torch
from light import Light, cells_of, undoing
from oracles import TOLERANCE, alone, extended, generate, language_model, visual_and_real
from transformers import CompileConfig

import vtoken
from vtoken.engine import masks
from vtoken.engine.light import plan
from vtoken.engine.light.attention import LightAttention
from vtoken.light import LightLayer
from vtoken.profile.flops import flop_counter
from vtoken.reducers.heads import HeadRatios

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl")
BATCH = (1, 2, 0)
LOGITS = {"output_logits": True, "return_dict_in_generate": True}
SOME_HEADS = (True, False, False, True)


def in_layers(light, layers=range(4), drop=None):
    return Light(tuple((layer, light) for layer in layers), drop)


PLANS = {
    "ffn": in_layers(LightLayer(ffn=0.0), (0, 2)),
    "part of the ffn": in_layers(LightLayer(ffn=0.4)),
    "attention": in_layers(LightLayer(attention=False), (1, 2)),
    "block": in_layers(LightLayer(attention=False, ffn=0.0), (1, 3)),
    "window": in_layers(LightLayer(window=3)),
    "heads": in_layers(LightLayer(heads=SOME_HEADS), (0, 1, 3)),
    "all, then none": in_layers(LightLayer(ffn=0.5, window=3, heads=SOME_HEADS), drop=2),
}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_plan = pytest.mark.parametrize("name", PLANS)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def equals_the_full_run(model, inputs, reducer, cells, steps=2):
    """Prefill and cached decode steps, against the stock model on the whole sequence with work undone by hooks."""
    with vtoken.reduce(model, reducer):
        out = generate(model, inputs, steps, **LOGITS)
    length = inputs["input_ids"].shape[1]
    for step in range(steps):
        longer = extended(model, inputs, out.sequences[:, length : length + step])
        with undoing(model, reducer, inputs, cells), torch.no_grad():
            wanted = model(**longer).logits[:, -1]
        torch.testing.assert_close(out.logits[step], wanted, **TOLERANCE)


@every_plan
@every_family
def test_light_layers_equal_the_full_run_without_the_work(family, name):
    model, inputs = tiny.make(family, BATCH)
    equals_the_full_run(model, inputs, PLANS[name], cells_of(family, model, inputs))


@every_plan
def test_light_layers_under_eager_attention(name):
    model, inputs = tiny.make("llava", BATCH, attn="eager")
    equals_the_full_run(model, inputs, PLANS[name], cells_of("llava", model, inputs))


@pytest.mark.parametrize("family", ["gemma3", "aya_vision", "paligemma", "qwen3_vl_moe"])
def test_sliding_parallel_prefix_and_expert_layers(family):
    model, inputs = tiny.make(family, (1, 2))
    cells = cells_of(family, model, inputs)
    names = ("block", "window", "heads") if family == "qwen3_vl_moe" else ("block", "all, then none")
    for name in names:
        equals_the_full_run(model, inputs, PLANS[name], cells)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_blocks_with_bands_of_keys(family, monkeypatch):
    """Blocks of four queries, so that small pictures need several; a band is narrower than the picture."""
    made = []

    def small(pairs):
        made.append((pairs.shape[1], found := small_bands(pairs)))
        return found

    small_bands = functools.partial(plan.bands, block=4)
    monkeypatch.setattr(plan, "bands", small)
    model, inputs = tiny.make(family, BATCH)
    equals_the_full_run(model, inputs, in_layers(LightLayer(window=3)), cells_of(family, model, inputs), steps=1)
    assert all(len(found.queries) > 1 and found.keys.shape[1] < n for n, found in made)


@every_family
def test_a_batch_gives_each_row_what_it_gives_alone(family):
    model, inputs = tiny.make(family, BATCH)
    for name in ("block", "all, then none"):
        with vtoken.reduce(model, PLANS[name]), torch.no_grad():
            together = model(**inputs).logits
            for row in range(len(BATCH)):
                logits = model(**alone(inputs, row, BATCH)).logits
                torch.testing.assert_close(together[row : row + 1, -logits.shape[1] :], logits, **TOLERANCE)


@every_family
def test_generate_with_cache_equals_without(family):
    model, inputs = tiny.make(family, (1, 2))
    for name in ("block", "all, then none"):
        with vtoken.reduce(model, PLANS[name]):
            ids = generate(model, inputs, 4)
            assert torch.equal(ids, generate(model, inputs, 4, use_cache=False))
            assert torch.equal(ids, generate(model, inputs, 4, cache_implementation="static"))


@every_family
def test_a_second_turn_goes_on_from_the_cache(family):
    model, inputs = tiny.make(family, (1,))
    with vtoken.reduce(model, PLANS["all, then none"]):
        first = generate(model, inputs, 4, return_dict_in_generate=True)
        turn = extended(model, inputs, first.sequences[:, inputs["input_ids"].shape[1] :])
        turn.pop("position_ids")
        cache = copy.deepcopy(first.past_key_values)
        text = {name: turn[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids") if name in turn}
        assert torch.equal(generate(model, text, 4, past_key_values=cache), generate(model, turn, 4))


@pytest.mark.parametrize(
    "chain",
    [
        vtoken.Chain([vtoken.IMA(skip="block", every=1), vtoken.DivPrune(keep=0.5)]),
        vtoken.Chain([vtoken.DivPrune(keep=0.5), vtoken.YOPO(window=3)]),
        vtoken.Chain([vtoken.Pooled(keep=0.5), vtoken.IMA(), vtoken.FastV(keep=0.25, layer=2), vtoken.YOPO(window=3)]),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen3_vl"])
def test_chains_drop_and_hide_alike(family, chain):
    model, inputs = tiny.make(family, BATCH)
    answers = []
    for backend in ("drop", "mask"):
        with vtoken.reduce(model, chain, backend=backend):
            answers.append(generate(model, inputs, 3, **LOGITS))
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    for one, two in zip(answers[0].logits, answers[1].logits, strict=True):
        torch.testing.assert_close(one, two, **TOLERANCE)


def test_a_chain_skips_what_any_of_its_stages_skips():
    chain = vtoken.Chain([vtoken.IMA(every=1), vtoken.YOPO(window=3, ffn=0.5, drop_layer=3)])
    assert chain.stages == ("in_llm", "light")
    assert chain.light_layers(4) == {
        0: LightLayer(ffn=0.5, window=3),
        1: LightLayer(ffn=0.0, window=3),
        2: LightLayer(ffn=0.0, window=3),
        3: LightLayer(ffn=0.0),
    }


@pytest.mark.parametrize(("family", "attn"), [("llava", "eager"), *((family, "sdpa") for family in FAMILIES)])
def test_nothing_light_is_bit_identical_and_unwrap_leaves_no_trace(family, attn):
    model, inputs = tiny.make(family, BATCH, attn=attn)
    logits, ids = model(**inputs).logits, generate(model, inputs, 2)
    before = {name: (sorted(vars(m)), len(m._forward_hooks)) for name, m in model.named_modules()}
    for reducer in (vtoken.YOPO(window=None, ffn=1.0, drop_layer=None), in_layers(LightLayer())):
        with vtoken.reduce(model, reducer):
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(generate(model, inputs, 2), ids)
    with vtoken.reduce(model, PLANS["all, then none"]):
        assert not torch.equal(model(**inputs).logits, logits)
    assert {name: (sorted(vars(m)), len(m._forward_hooks)) for name, m in model.named_modules()} == before
    assert torch.equal(model(**inputs).logits, logits)


def test_text_prompts_and_decode_steps_compute_everything():
    model, inputs = tiny.make("llava", (1,))
    ids = inputs["input_ids"][:, -5:]
    logits = model(input_ids=ids).logits
    with vtoken.reduce(model, PLANS["block"]):
        model(**inputs)
        assert torch.equal(model(input_ids=ids).logits, logits)


@pytest.mark.parametrize(("name", "layers"), [("ffn", (0, 2)), ("block", (1, 3))])
def test_the_feed_forward_network_gets_text_rows_only(name, layers):
    model, inputs = tiny.make("llava_next", BATCH)
    visual, real = visual_and_real(inputs)
    rows = []
    for layer in language_model(model).layers:
        layer.mlp.down_proj.register_forward_hook(lambda _, args, __: rows.append(args[0].flatten(0, -2).shape[0]))
    with vtoken.reduce(model, PLANS[name]), torch.no_grad():
        model(**inputs)
    text = int((real & ~visual).sum())
    assert rows == [text if layer in layers else real.numel() for layer in range(4)]


def test_operations_are_saved_in_proportion():
    """Counted by PyTorch: the difference to the full run is that of the rows, neurons, heads and keys left out."""
    model, inputs = tiny.make("llava", (1,))
    visual, _ = visual_and_real(inputs)
    config, total, pictures = model.config.text_config, visual.shape[1], int(visual.sum())
    width, neurons = config.hidden_size, config.intermediate_size

    def operations(reducer):
        with torch.no_grad(), flop_counter() as counter:
            if reducer is None:
                model(**inputs)
            else:
                with vtoken.reduce(model, reducer):
                    model(**inputs)
        return counter.get_total_flops()

    def attended(rows):  # by all four heads: scores, then the sum of the values
        return 2 * 2 * rows * total * width

    whole = operations(None)
    ffn, projection = 2 * 3 * pictures * width * neurons, 2 * pictures * width * width
    saved = {name: whole - operations(reducer) for name, reducer in PLANS.items()}
    assert saved["ffn"] == 2 * ffn
    kept = round(0.4 * neurons) / neurons
    assert saved["part of the ffn"] == pytest.approx(4 * (1 - kept) * ffn)
    assert saved["attention"] == 2 * (2 * projection + attended(pictures))
    assert saved["block"] == saved["attention"] + saved["ffn"]
    assert saved["heads"] == 3 * attended(pictures) / 2
    assert saved["all, then none"] > 2 * 2 * (4 * projection + ffn) / 2


def test_a_window_costs_operations_by_its_size_and_not_by_the_picture():
    """Scores of a windowed picture grow with its tokens, those of the full run with their square."""
    counts = {}
    for side in (24, 48):
        cells = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        here = torch.ones(1, side**2, dtype=torch.bool)
        flat = torch.zeros(1, side**2, dtype=torch.long)
        rows, columns = (axis[None] for axis in cells.unbind(1))

        def see(rows, shape=(side**2, side**2)):
            return masks.rows_seen(None, rows, shape, True)[:, 0]

        found = plan.BandPlan.of(here, (flat, rows, columns), 5, see)
        counts[side] = found.seen.numel()
        wanted = (cells[:, None] - cells[None]).abs().amax(-1) <= 2
        assert int(found.seen.flatten(0, 2)[found.valid[0]].sum()) == int(wanted.tril().sum())
    assert counts[24] < 576**2 / 2
    assert counts[48] < 2304**2 / 8
    assert counts[48] < 5 * counts[24]


def test_stats_name_the_light_layers():
    model, inputs = tiny.make("llava", (1,))
    with vtoken.reduce(model, vtoken.IMA()):
        model(**inputs)
        assert vtoken.stats(model).light == {2: LightLayer(ffn=0.0)}
        assert "light layers: 2" in str(vtoken.stats(model))


def test_flash_attention_2(monkeypatch):
    model, inputs = tiny.make("llava", BATCH)
    for name in ("block", "window", "heads"):
        with vtoken.reduce(model, PLANS[name]):
            wanted = generate(model, inputs, 4)
            with monkeypatch.context() as patch:
                twin = copy.deepcopy(model)
                flash.install(patch, twin)
                assert torch.equal(generate(twin, inputs, 4), wanted)
            assert flash.CALLS


def test_compiled_decode_steps():
    model, inputs = tiny.make("llava", (1,), num_hidden_layers=2)
    config = CompileConfig(backend="eager", mode=None, fullgraph=False)
    config._compile_all_devices = True
    reducer = Light(((0, LightLayer(ffn=0.0, window=3)), (1, LightLayer(attention=False, ffn=0.5))))
    with vtoken.reduce(model, reducer), torch.no_grad():
        ids = generate(model, inputs, 3)
        torch._dynamo.reset()
        assert torch.equal(generate(model, inputs, 3, cache_implementation="static", compile_config=config), ids)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_gradients_flow_through_the_rows_that_are_computed():
    model, inputs = tiny.make("llava", (1,))
    model.train()
    with vtoken.reduce(model, in_layers(LightLayer(ffn=0.5, window=3, heads=SOME_HEADS))):
        model(**inputs, labels=inputs["input_ids"].masked_fill(visual_and_real(inputs)[0], -100)).loss.backward()
    for layer in language_model(model).layers:
        assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
        assert layer.mlp.down_proj.weight.grad.any()


def wraps(family, reducer, words, error=NotImplementedError):
    model, _ = tiny.make(family, (1,))
    with pytest.raises(error, match=words):
        vtoken.wrap(model, reducer)


def test_what_cannot_be_light_is_a_sentence():
    wraps("qwen3_5", vtoken.YOPO(ffn=1.0), "Decoder layer 0 of Qwen3_5TextModel is recurrent")
    wraps("qwen3_5", HeadRatios(), "'head-ratios' reads the attention of decoder layer 0, which is recurrent")
    wraps("qwen3_vl_moe", vtoken.YOPO(), r"no neurons in plain linear layers .* give ffn=0 or ffn=1")
    wraps("llava", in_layers(LightLayer(heads=(True,) * 3)), "which of 3 heads .* the model has 4", ValueError)
    wraps("llava", vtoken.YOPO(heads=((True,) * 4,) * 3), "heads=3 layers, but the decoder has 4", ValueError)
    wraps("llava", in_layers(LightLayer(ffn=0.0), (7,)), "wants layer 7, but the decoder has 4 layers", ValueError)
    both = vtoken.Chain([vtoken.AIM(first=1, last=3), vtoken.YOPO(drop_layer=None)])
    wraps("llava", both, "rows of visual tokens are read in layer", ValueError)


def test_recurrent_layers_may_skip_their_feed_forward_network():
    model, inputs = tiny.make("qwen3_5", (1, 2))
    reducer = in_layers(LightLayer(ffn=0.0))
    visual, _ = visual_and_real(inputs)
    with vtoken.reduce(model, reducer), torch.no_grad():
        found = model(**inputs).logits
    with undoing(model, reducer, inputs, torch.zeros(0)), torch.no_grad():
        wanted = model(**inputs).logits
    text = inputs["attention_mask"].bool() & ~visual
    torch.testing.assert_close(found[text], wanted[text], **TOLERANCE)


def test_a_layer_without_a_network_of_its_own_is_a_sentence():
    model, _ = tiny.make("llava", (1,))
    layer = language_model(model).layers[2]
    layer.feed_forward = layer.mlp
    del layer.mlp
    with pytest.raises(NotImplementedError, match="LlamaDecoderLayer has no feed-forward network under the name mlp"):
        vtoken.wrap(model, vtoken.IMA())


def test_softcapped_attention_is_refused():
    attend = LightAttention(3, LightLayer(attention=False), None, {})
    with pytest.raises(NotImplementedError, match="layer 3 uses softcap"):
        attend(torch.nn.Identity(), *torch.ones(3, 1, 1, 2, 4), None, {"softcap": 30.0})


def test_gradient_checkpointing_is_refused():
    model, inputs = tiny.make("llava", (1,))
    model.gradient_checkpointing_enable()
    model.train()
    with vtoken.reduce(model, PLANS["ffn"]), pytest.raises(NotImplementedError, match="gradient checkpointing"):
        model(**inputs)


def test_a_light_reducer_cannot_shorten_a_prompt():
    model, inputs = tiny.make("llava", (1,))
    with pytest.raises(ValueError, match="'ima' acts inside of the language model"):
        vtoken.shorten(model, inputs, "ima")
