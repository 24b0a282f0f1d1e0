# SPDX-License-Identifier: Apache-2.0
"""Ways of running a model: each works as without vtoken, or raises the sentence that the documentation names."""

from __future__ import annotations

import copy

import flash
import pytest
import tiny
import torch
from oracles import PLANS, TOLERANCE, extended, generate, masked_oracle, visual_and_real
from transformers import CompileConfig, DynamicCache

import vtoken

every_family = pytest.mark.parametrize("family", sorted(tiny.BUILDERS))
every_core = pytest.mark.parametrize("family", tiny.CORE)
STEPS = {"output_logits": True, "return_dict_in_generate": True}
plans = pytest.mark.parametrize("plan", ["before", "inside", "both"])
VIDEO = ["llava_onevision", "llava_next_video", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def same(left, right):
    assert torch.equal(left.sequences, right.sequences)
    for a, b in zip(left.logits, right.logits, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@plans
@pytest.mark.parametrize("family", VIDEO)
def test_clips(family, plan):
    """Prefill and decode against the stock model with explicit masks; a clip is one item."""
    model, inputs = tiny.make(family, (1, 1), video=True)
    if tiny.VERSION <= (5, 5) and family == "llava_onevision":  # there the newline of a clip is added after encoding
        with vtoken.reduce(model, PLANS[plan]), pytest.raises(NotImplementedError, match="newer transformers"):
            model(**inputs)
        return
    visual, real = visual_and_real(inputs)
    with vtoken.reduce(model, PLANS[plan]):
        out = generate(model, inputs, 3, **STEPS)
        lengths = vtoken.stats(model).tokens.tolist()
    length = inputs["input_ids"].shape[1]
    for step in range(3):
        longer = extended(model, inputs, out.sequences[:, length : length + step])
        with masked_oracle(model, PLANS[plan], visual, real, lengths), torch.no_grad():
            wanted = model(**longer).logits[:, -1]
        torch.testing.assert_close(out.logits[step], wanted, **TOLERANCE)


@plans
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_pictures_clips_and_text_in_one_batch(family, plan):
    model, clips = tiny.make(family, (1,), video=True)
    _, pictures = tiny.make(family, (2,))
    texts = [row["input_ids"][0] for row in (pictures, clips)] + [torch.arange(20, 29)]
    inputs = tiny.assemble([[text] for text in texts], torch.Generator())
    for source in (pictures, clips):
        inputs |= {name: source[name] for name in source if name.startswith(("pixel", "image_", "video_"))}
    if "mm_token_type_ids" in pictures:
        ids = inputs["input_ids"]
        inputs["mm_token_type_ids"] = (ids == tiny.IMAGE_ID).int() + 2 * (ids == tiny.VIDEO_ID).int()
    with vtoken.reduce(model, PLANS[plan]):
        out = generate(model, inputs, 4, **STEPS)
        rows = [image.row for image in vtoken.stats(model).images]
        alone = [generate(model, source, 4) for source in (pictures, clips)]
    with vtoken.reduce(model, PLANS[plan], backend="mask"):
        same(out, generate(model, inputs, 4, **STEPS))
    assert rows == [0, 0, 1]
    for row, single in enumerate(alone):
        assert torch.equal(out.sequences[row, -4:], single[0, -4:])


def test_several_pictures_in_a_row_of_onevision():
    """With ``batch_num_images`` OneVision shows each of several pictures in a single view."""
    model, _ = tiny.make("llava_onevision", (1,))
    generator = torch.Generator().manual_seed(2)
    inputs = tiny.assemble(tiny.image_rows([17, 17, 56], (2, 1)), generator)
    pixels = torch.randn(3, 3, 3, tiny.SIDE, tiny.SIDE, generator=generator)
    inputs |= {"pixel_values": pixels, "image_sizes": torch.tensor([[24, 48], [24, 24], [48, 24]])}
    inputs["batch_num_images"] = torch.tensor([2, 1])
    found = vtoken.token_map(model, inputs)
    assert [sorted(set(found.view[found.image == image].tolist())) for image in range(3)] == [
        [-1, 0],
        [-1, 0],
        [-1, 0, 1, 2],
    ]
    with vtoken.reduce(model, "fopru", keep=0.25):
        generate(model, inputs, 3)
        found = [image.kept for image in vtoken.stats(model).images]
    assert found == [4 + 1, 4 + 1, 12 + 8], "a quarter of the patches, and all newlines"


@plans
@pytest.mark.parametrize("family", sorted({*tiny.BUILDERS} - {*tiny.HYBRID, *tiny.SLIDING}))
def test_prompt_lookup_assisted(family, plan):
    model, inputs = tiny.make(family, (2,))
    inputs["input_ids"][0, -4:-2] = inputs["input_ids"][0, -2:]  # so that there are candidates
    with vtoken.reduce(model, PLANS[plan]):
        plain = generate(model, inputs, 8, eos_token_id=tiny.EOS)
        assisted = generate(model, inputs, 8, eos_token_id=tiny.EOS, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, assisted)


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("family", ["llava"])
def test_static_cache_with_a_compiled_decode_step(family, positions):
    model, inputs = tiny.make(family, (1, 2), num_hidden_layers=3)
    config = CompileConfig(backend="eager", mode=None, fullgraph=False)
    config._compile_all_devices = True
    with vtoken.reduce(model, PLANS["both"], positions=positions):
        wanted = generate(model, inputs, 4)
        torch._dynamo.reset()
        found = generate(model, inputs, 4, cache_implementation="static", compile_config=config)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert torch.equal(found, wanted)


@every_core
def test_a_coming_layer_is_read_in_a_static_cache(family):
    """Its mask has free columns behind the prompt, also where an earlier layer has dropped tokens."""
    model, inputs = tiny.make(family, (1, 2))
    with vtoken.reduce(model, "pyramiddrop", keep=0.3):
        wanted = generate(model, inputs, 4)
        kept = vtoken.stats(model).layers
        assert torch.equal(generate(model, inputs, 4, cache_implementation="static"), wanted)
        assert vtoken.stats(model).layers == kept


@every_core
def test_torch_compile_of_the_model(family):
    model, inputs = tiny.make(family, (1, 2))
    with vtoken.reduce(model, PLANS["both"]), torch.no_grad():
        wanted = model(**inputs).logits
        torch._dynamo.reset()
        found = torch.compile(model, backend="eager")(**inputs).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@plans
def test_a_cache_of_the_caller(plan):
    model, inputs = tiny.make("llava", (1, 2))
    with vtoken.reduce(model, PLANS[plan]):
        wanted = generate(model, inputs)
        assert torch.equal(generate(model, inputs, past_key_values=DynamicCache()), wanted)
        assert torch.equal(generate(model, inputs, past_key_values=DynamicCache(config=model.config)), wanted)


@plans
def test_inputs_embeds(plan):
    """Placeholders are recognised by their embedding, as transformers does."""
    model, inputs = tiny.make("llava", (1, 2))
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with vtoken.reduce(model, PLANS[plan]):
        wanted = generate(model, inputs)[:, inputs["input_ids"].shape[1] :]
        rest = {name: value for name, value in inputs.items() if name != "input_ids"}
        assert torch.equal(generate(model, rest, inputs_embeds=embeds), wanted)


@plans
@every_family
def test_right_padding_in_a_forward_pass(family, plan):
    """As in training: the states of kept tokens are those of the left-padded batch."""
    model, inputs = tiny.make(family, (1, 2))
    real = inputs["attention_mask"].bool()
    right = dict(inputs)
    for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            rows = [torch.cat([row[at], row[~at]]) for row, at in zip(inputs[name], real, strict=True)]
            right[name] = torch.stack(rows)
    with vtoken.reduce(model, PLANS[plan]), torch.no_grad():
        left_logits, right_logits = model(**inputs).logits, model(**right).logits
    for row in range(2):
        count = int(real[row].sum())
        torch.testing.assert_close(right_logits[row, :count], left_logits[row, -count:], **TOLERANCE)


BLIND = vtoken.Chain([vtoken.Random(keep=0.5), vtoken.VTW()])
"""Drops before and inside the decoder, whatever the values are."""


def assert_near(found, expected):
    """As near as half precision comes; most families are within 0.05, recurrent layers within 0.08."""
    assert found.isfinite().all()
    assert (found.float() - expected).norm() < 0.15 * expected.norm()


@every_family
def test_bfloat16(family):
    model, inputs = tiny.make(family, (1, 2))
    with vtoken.reduce(model, BLIND), torch.no_grad():
        expected = model(**inputs).logits
        model.to(torch.bfloat16)
        inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
        assert_near(model(**inputs).logits, expected)
        assert generate(model, inputs, 2).shape[1] == inputs["input_ids"].shape[1] + 2


@every_family
def test_autocast(family):
    model, inputs = tiny.make(family, (1, 2))
    with vtoken.reduce(model, BLIND), torch.no_grad():
        expected = model(**inputs).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_near(model(**inputs).logits, expected)
            assert generate(model, inputs, 2).shape[1] == inputs["input_ids"].shape[1] + 2


@plans
@every_family
def test_gradient_checkpointing(family, plan):
    model, inputs = tiny.make(family, (1, 2))
    model.train()
    labels = inputs["input_ids"].masked_fill(visual_and_real(inputs)[0], -100)
    grads = []
    for checkpointing in (False, True):
        (model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable)()
        model.zero_grad()
        with vtoken.reduce(model, PLANS[plan]):
            if checkpointing and plan != "before" and tiny.VERSION < (5, 23):
                with pytest.raises(NotImplementedError, match="gradient checkpointing"):
                    model(**inputs, labels=labels, use_cache=False)
                return
            model(**inputs, labels=labels, use_cache=False).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    tower = [name for name in grads[0] if "vision" in name or "visual" in name]
    assert any(bool(grads[0][name].any()) for name in tower), "gradients reach the tower"
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["fopru", "fastv", "tome", "pyramiddrop"])
@pytest.mark.parametrize("first", ["wrap", "offload"])
@pytest.mark.parametrize("family", ["llava", "vipllava", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_accelerate_offload_hooks(family, name, first):
    """Weights on the meta device, loaded for each call by accelerate's hooks, which replace ``module.forward``.

    Families are missing whose stock models fail with such hooks: they keep weights outside of submodules.
    """
    accelerate = pytest.importorskip("accelerate")
    model, inputs = tiny.make(family, (1, 2))
    with vtoken.reduce(model, name, keep=0.4):
        wanted = generate(model, inputs)
    if first == "wrap":
        vtoken.wrap(model, name, keep=0.4)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.device.type == "meta"
    if first == "offload":
        vtoken.wrap(model, name, keep=0.4)
    assert torch.equal(generate(model, inputs), wanted)
    vtoken.unwrap(model)


@plans
@pytest.mark.parametrize("first", ["wrap", "peft"])
@every_family
def test_peft(family, plan, first):
    peft = pytest.importorskip("peft")
    model, inputs = tiny.make(family, (1, 2))
    config = peft.LoraConfig(target_modules=r".*(language_model|text_model).*(q_proj|v_proj)", init_lora_weights=False)
    answers = []
    for _ in range(2):
        torch.manual_seed(0)
        model, inputs = tiny.make(family, (1, 2))
        if first == "wrap":
            vtoken.wrap(model, PLANS[plan])
        tuned = peft.get_peft_model(model, config).eval()
        if first == "peft":
            vtoken.wrap(tuned, PLANS[plan])
        answers.append(generate(tuned, inputs, use_cache=not answers))
    assert torch.equal(*answers)


@every_family
def test_saving_a_wrapped_model_saves_the_stock_one(family, tmp_path):
    model, inputs = tiny.make(family, (1, 2))
    expected = generate(model, inputs)
    with vtoken.reduce(model, PLANS["both"]):
        pruned = generate(model, inputs)
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    loaded.generation_config = model.generation_config
    assert torch.equal(generate(loaded, inputs), expected)
    with vtoken.reduce(loaded, PLANS["both"]):
        assert torch.equal(generate(loaded, inputs), pruned)


@plans
@every_family
def test_deepcopy_of_a_wrapped_model(family, plan):
    """The copy is wrapped and independent."""
    model, inputs = tiny.make(family, (1, 2))
    with vtoken.reduce(model, PLANS[plan]):
        wanted = generate(model, inputs)
        twin = copy.deepcopy(model)
        assert torch.equal(generate(twin, inputs), wanted)
        assert vtoken.stats(twin) is not vtoken.stats(model)
        assert vtoken.stats(twin).images == vtoken.stats(model).images
        for parameter in twin.parameters():
            parameter.data.zero_()
        vtoken.unwrap(twin)
        assert torch.equal(generate(model, inputs), wanted)


@plans
@pytest.mark.parametrize("batch", [(2,), (1, 2)], ids=str)
@pytest.mark.parametrize("family", sorted({*tiny.BUILDERS} - {*tiny.SLIDING}))
def test_flash_attention_2(family, batch, plan, monkeypatch):
    model, inputs = tiny.make(family, batch)
    with vtoken.reduce(model, PLANS[plan]):
        wanted = generate(model, inputs, 4, **STEPS)
    flash.install(monkeypatch, model)
    with vtoken.reduce(model, PLANS[plan]):
        same(generate(model, inputs, 4, **STEPS), wanted)
    assert flash.CALLS


@plans
@pytest.mark.parametrize("family", ["llava"])
def test_flash_attention_2_in_a_second_turn(family, plan, monkeypatch):
    """Fewer queries than keys and position ids with gaps must not be taken for packed sequences."""
    answers = []
    for use_flash in (False, True):
        model, inputs = tiny.make(family, (1,))
        if use_flash:
            flash.install(monkeypatch, model)
        with vtoken.reduce(model, PLANS[plan]):
            first = generate(model, inputs, 3, return_dict_in_generate=True)
            ids = torch.cat([first.sequences, inputs["input_ids"]], 1)
            turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            turn["pixel_values"] = inputs["pixel_values"].flip(-1)
            answers.append(generate(model, turn, 4, past_key_values=first.past_key_values, **STEPS))
    same(*answers)


@plans
@pytest.mark.parametrize("backend", ["drop", "mask"])
@pytest.mark.parametrize("family", tiny.SLIDING)
def test_flash_attention_beyond_a_sliding_window_is_refused(family, backend, plan, monkeypatch, record_property):
    record_property("refused", "FA2 (emulated)")
    model, inputs = tiny.make(family, (1,))
    flash.install(monkeypatch, model)
    with (
        vtoken.reduce(model, PLANS[plan], backend=backend),
        pytest.raises(NotImplementedError, match="sliding window of 14"),
    ):
        generate(model, inputs, 2)


@pytest.mark.skipif(not tiny.ENCODED_INPUT, reason="transformers < 5.18 prefills in one piece with pixels")
def test_chunked_prefill_is_refused():
    model, inputs = tiny.make("llava", (1,))
    with vtoken.reduce(model, PLANS["before"]), pytest.raises(NotImplementedError, match="prefill_chunk_size"):
        generate(model, inputs, prefill_chunk_size=8)


def test_hidden_states_have_the_lengths_of_their_layers():
    """They are not padded: logits and labels keep their shapes, intermediate states tell what was computed."""
    model, inputs = tiny.make("llava", (1,))
    with vtoken.reduce(model, PLANS["inside"]), torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    lengths = [state.shape[1] for state in out.hidden_states]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == inputs["input_ids"].shape[1] > lengths[-2]
    assert out.logits.shape[1] == lengths[0]
