# SPDX-License-Identifier: Apache-2.0
"""The doctor finds each kind of broken adapter and names the right check, calls no noise a fault, and says what it
cannot examine in one sentence."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
import torch
import transformers as tf
import zoo
from transformers import AutoTokenizer
from typer.testing import CliRunner

import vtoken
from vtoken import adapters, mini
from vtoken.adapters.base import IMAGE
from vtoken.cli import app
from vtoken.doctor import examine, outcome
from vtoken.doctor.prompts import join, prompts_of
from vtoken.doctor.report import Check, Cost, Report
from vtoken.doctor.verdict import judge
from vtoken.wrapping import session_of

SHORTEST = 25
"""Tokens of the shorter of the two prompts made of a tiny LLaVA's: what has fewer rows was cut."""


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def examined(model, inputs, **options):
    return vtoken.check(model, inputs, **{"reducers": ["random"], "measure": False, **options})


def tiny_llava():
    return tiny.make("llava", (1,))


def statuses(report):
    return {check.name: check.status for check in report.checks}


# ------------------------------------------------------------------------------------------------------ broken adapters
def rolled_layouts(self, modality, call, lengths):
    found = super(type(self), self).layouts(modality, call, lengths)
    return [replace(layout, row=layout.row.flip(0), column=layout.column.flip(0)) for layout in found]


def rolled_pack(self, parts, modality, call):
    return super(type(self), self).pack(parts, modality, call).roll(1, 0)


def placeholder_beside(self, model):
    super(type(self), self).__init__(model)
    self.placeholders = {**self.placeholders, IMAGE: self.placeholders[IMAGE] + 1}


def takes_text_too(self, input_ids, inputs_embeds):
    kinds = super(type(self), self).modality(input_ids, inputs_embeds)
    return torch.where(torch.arange(kinds.shape[1]) == kinds.shape[1] - 3, IMAGE, kinds)


def changing(owner, change):
    """An ``install`` that puts ``change(original)`` in the place of a module's forward."""

    def install(self, hooks):
        super(type(self), self).install(hooks)
        hooks.replace(owner(self), "forward", change)

    return install


def mlp(adapter):
    return adapter.layers[0].mlp


def adds_a_little(original):
    return lambda x: original(x) + 1e-3


def mixes_rows(original):
    """Once tokens were dropped, rows of a batch see each other."""

    def forward(x):
        out = original(x)
        return out + 0.1 * out.mean(0, keepdim=True) if len(x) > 1 and 1 < x.shape[1] < SHORTEST else out

    return forward


def renumbers(original):
    """Tokens that are left get positions without gaps."""

    def forward(x, position_ids, **kwargs):
        length = position_ids.shape[-1]
        cut = 1 < length < SHORTEST
        return original(x, torch.arange(length)[None].expand_as(position_ids) if cut else position_ids, **kwargs)

    return forward


def forgets_the_cut(original):
    """Decode steps after a cut compute something else."""
    state = {"cut": False}

    def forward(x):
        if x.shape[1] > 1:
            state["cut"] = x.shape[1] < SHORTEST
        return original(x) + 0.1 * (state["cut"] and x.shape[1] == 1)

    return forward


def leaves_a_hook(self, hooks):
    self.layers[0].register_forward_hook(lambda *_: None)


def same_attention_for_all(self, layer):
    return self.layers[1].self_attn


BROKEN = {
    "layouts": ({"layouts": rolled_layouts}, "token map"),
    "pack": ({"pack": rolled_pack}, "tower map"),
    "placeholder off by one": ({"__init__": placeholder_beside}, "placeholders"),
    "text taken for visual": ({"modality": takes_text_too}, "placeholders"),
    "kv source": ({"kv_source": lambda self, layer: 1 if layer == 3 else layer}, "shared keys"),
    "attention of another layer": ({"attention": same_attention_for_all}, "attention that ran"),
    "norm": ({"attention_norm": "post_attention_layernorm"}, "coming attention"),
    "keep all changed": ({"install": changing(mlp, adds_a_little)}, "keep all"),
    "hook left": ({"install": leaves_a_hook}, "keep all"),
    "positions": ({"install": changing(lambda a: a.language_model.rotary_emb, renumbers)}, "drop = mask"),
    "rows mixed": ({"install": changing(mlp, mixes_rows)}, "batch = alone"),
    "steps": ({"install": changing(mlp, forgets_the_cut)}, "cache = no cache"),
}


def break_adapter(monkeypatch, family, members):
    broken = type("Broken", (adapters.families()[family],), members)
    monkeypatch.setattr(adapters, "families", lambda: {family: broken})


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_adapter_is_found_and_the_right_check_blames_it(fault, monkeypatch):
    members, check = BROKEN[fault]
    model, inputs = tiny_llava()
    break_adapter(monkeypatch, "llava", members)
    report = examined(model, inputs)
    assert report.faults[0] == check, report.checks
    assert report.exit_code == 1
    assert report.verdict.startswith(f"Fault found on LlavaForConditionalGeneration: {check}: ")


def test_a_forgotten_per_token_argument_is_found(monkeypatch):
    model, inputs = tiny.make("qwen3_vl", (1,))
    break_adapter(monkeypatch, "qwen3_vl", {"cut_extras": lambda self, kwargs, index, valid: kwargs})
    report = examined(model, inputs)
    assert report.faults[0] == "per-token arguments"
    assert "visual_pos_masks" in report.verdict


def test_shared_keys_that_the_adapter_does_not_know_of_are_found(monkeypatch):
    case = zoo.make("gemma4", (1,))
    break_adapter(monkeypatch, "gemma4", {"kv_source": lambda self, layer: layer})
    report = examined(case.model, case.inputs)
    assert report.faults[0] == "shared keys"
    assert "leaves no keys in the cache" in report.verdict


# ---------------------------------------------------------------------------------------------------------- good models
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "qwen3_5"])
def test_a_good_model_passes(family):
    model, inputs = tiny.make(family, (1,))
    model(**inputs)  # transformers adds hooks of its own at the first forward pass
    hooks = [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in model.modules()]
    report = examined(model, inputs, keep=[0.5, 2])
    assert report.faults == []
    assert report.exit_code == 0
    found = statuses(report)
    recurrent = family == "qwen3_5"
    assert found["drop = mask"] == ("skipped" if recurrent else "passed")
    assert {found[name] for name in ("keep all", "drop = shorter prompt", "batch = alone", "cache = no cache")} == {
        "passed"
    }
    assert [row.reducer for row in report.reducers] == ["random at 0.5", "random at 2"]
    assert session_of(model) is None
    assert [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in model.modules()] == hooks
    assert model.config._attn_implementation == "sdpa"


def test_shared_keys_are_traced_to_their_layer():
    case = zoo.make("gemma4", (1,))
    report = examined(case.model, case.inputs)
    detail = next(check.detail for check in report.checks if check.name == "shared keys")
    assert detail == "2 layers use the keys of layers [2, 3]."


def test_rounding_of_a_short_type_is_no_fault():
    model, inputs = tiny.make("llava_next", (1,))
    report = examined(model.to(torch.bfloat16), inputs)
    assert report.faults == []
    assert report.noise.tolerance > 1e-3, "measured on the unwrapped model, not set for float32"


def test_a_comparison_that_shows_nothing_says_so():
    model, inputs = tiny_llava()
    for layer in model.model.language_model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)  # no token sees another one
    report = examined(model, inputs)
    found = next(check for check in report.checks if check.name == "drop = mask")
    assert found.status == "unproven"
    assert found.numbers["share"] == 0
    assert "0% of 8 single tokens" in found.detail
    assert "showed nothing" in report.verdict


def test_reducers_work_or_refuse_with_their_sentence():
    model, inputs = tiny.make("qwen2_5_vl", (1,))
    rows = {row.reducer: row for row in examined(model, inputs, reducers=["globalcom2", "fopru", "vtw"]).reducers}
    assert rows["fopru at 0.25"].status == "passed"
    assert rows["fopru at 0.25"].tokens_kept < rows["fopru at 0.25"].tokens_in
    assert rows["globalcom2 at 0.25"].status == "refused"
    assert rows["globalcom2 at 0.25"].detail.endswith(".")
    assert "vtw" in rows, "without a budget, once"


def test_reducers_beyond_the_time_are_named():
    rows = examined(*tiny_llava(), reducers=["random", "fopru"], seconds=0.0).reducers
    assert [row.status for row in rows] == ["skipped", "skipped"]


def test_a_check_that_raises_is_a_row_and_the_others_go_on(monkeypatch):
    def fails(*args):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(examine.places, "tower_map", fails)
    report = examined(*tiny_llava())
    found = next(check for check in report.checks if check.name == "tower map")
    assert (found.status, found.detail) == ("failed", "RuntimeError: no such thing")
    assert found.traceback[-1].endswith("fails")
    assert statuses(report)["cache = no cache"] == "passed"
    assert report.exit_code == 1


def test_lack_of_memory_is_no_fault():
    assert outcome.of_error(torch.OutOfMemoryError("CUDA out of memory. Tried ...")).status == "skipped"
    assert outcome.of_error(ValueError("too many values to unpack")).status == "failed"


def test_flash_attention_that_is_asked_for_and_does_not_run_is_found(monkeypatch):
    model, inputs = tiny_llava()
    monkeypatch.setattr(examine.kernels, "_running", lambda *_: {"prefill": {"aten.bmm"}, "decode": set()})
    monkeypatch.setattr(model.model.language_model.config, "_attn_implementation_internal", "flash_attention_2")
    found = examine.kernels.kernels(model, adapters.adapter_for(model), prompts_of(model, *_user(model, inputs)))
    assert found.status == "failed"
    assert "FlashAttention is asked for and does not run" in found.detail


def _user(model, inputs):
    return adapters.adapter_for(model), inputs, None, 16


def test_kernels_of_the_decoder_are_seen():
    model, inputs = tiny_llava()
    report = examined(model, inputs)
    found = next(check for check in report.checks if check.name == "attention kernels")
    assert "flash_attention_for_cpu" in found.detail
    model.set_attn_implementation("eager")
    report = examined(model, inputs)
    found = next(check for check in report.checks if check.name == "attention kernels")
    assert "eager asked for; prefill: no fused kernel" in found.detail


# -------------------------------------------------------------------------------------------------------------- prompts
def test_prompts_are_joined_as_a_processor_would():
    model, _ = tiny.make("llava_next", (1,))
    parts = [tiny.make("llava_next", (1,))[1], tiny.make("llava_next", (1,))[1]]
    parts[1]["pixel_values"] = parts[1]["pixel_values"][:, :2]
    for name in ("input_ids", "attention_mask"):
        parts[1][name] = parts[1][name][:, 3:]
    joined = join(model, parts)
    assert tuple(joined["input_ids"].shape) == (2, parts[0]["input_ids"].shape[1])
    assert joined["attention_mask"].sum(1).tolist() == [part["input_ids"].shape[1] for part in parts]
    assert joined["input_ids"][1, :3].tolist() == [tiny.PAD] * 3
    assert joined["pixel_values"].shape[:2] == (2, 3)
    assert not joined["pixel_values"][1, 2].any()


def test_the_second_prompt_differs_in_length_and_picture():
    model, inputs = tiny_llava()
    found = prompts_of(model, *_user(model, inputs))
    assert found.second["input_ids"].shape[1] == found.first["input_ids"].shape[1] - 3 == SHORTEST
    assert not torch.equal(found.second["pixel_values"], found.first["pixel_values"])
    assert torch.equal(found.batch["pixel_values"][:1], inputs["pixel_values"])


# ------------------------------------------------------------------------------------------------------------ bad input
def text_model():
    return tf.LlamaForCausalLM(tf.LlamaConfig(**tiny.text_config()))


def on_meta():
    return tiny_llava()[0].to("meta")


def without(name):
    model = tiny_llava()[0]
    delattr(model.model, name)
    return model


def not_finite():
    model = tiny_llava()[0]
    model.lm_head.weight.data.fill_(float("nan"))
    return model


def wrapped():
    return vtoken.wrap(tiny_llava()[0], "random", keep=0.5)


def inputs():
    return tiny_llava()[1]


def several():
    return tiny.make("llava", (1, 1))[1]


def other_placeholders():
    found = inputs()
    found["input_ids"] = torch.where(found["input_ids"] == tiny.IMAGE_ID, 5, found["input_ids"])
    return found


BAD = {
    "text model": (text_model, inputs, {}, TypeError, "LlamaForCausalLM has no get_image_features"),
    "no model": (dict, inputs, {}, TypeError, "dict is no model"),
    "linear": (lambda: torch.nn.Linear(2, 2), inputs, {}, TypeError, "No adapter knows the model Linear"),
    "meta": (on_meta, inputs, {}, ValueError, "on the meta device"),
    "no language model": (lambda: without("language_model"), inputs, {}, TypeError, "has no language model"),
    "no tower": (lambda: without("vision_tower"), inputs, {}, TypeError, "has no vision tower"),
    "no projector": (lambda: without("multi_modal_projector"), inputs, {}, ValueError, "'multi_modal_projector'"),
    "not finite": (not_finite, inputs, {}, ValueError, "not finite"),
    "wrapped": (wrapped, inputs, {}, ValueError, "vtoken.unwrap"),
    "several prompts": (lambda: tiny_llava()[0], several, {}, ValueError, "a batch of 2 prompts"),
    "no pixels": (lambda: tiny_llava()[0], lambda: {"input_ids": torch.ones(1, 4).long()}, {}, ValueError, "no pixels"),
    "no ids": (lambda: tiny_llava()[0], dict, {}, ValueError, "no input_ids"),
    "wrong ids": (lambda: tiny_llava()[0], other_placeholders, {}, ValueError, "cannot run these prompts"),
    "reducer": (lambda: tiny_llava()[0], inputs, {"reducers": ["foprue"]}, ValueError, "did you mean 'fopru'"),
    "keep": (lambda: tiny_llava()[0], inputs, {"keep": 1.5}, ValueError, "keep=1.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_sentence(case):
    make, given, options, kind, text = BAD[case]
    with pytest.raises(kind) as caught:
        examined(make(), given(), **options)
    sentence = str(caught.value)
    assert text in sentence
    assert sentence.count(". ") == 0
    assert sentence.endswith((".", "?"))


def test_a_processor_that_does_not_fit_is_a_sentence():
    model, _ = mini.load("mini-llava")
    _, other = mini.load("mini-internvl")
    with pytest.raises(
        ValueError, match=r"does not fit LlavaForConditionalGeneration: its placeholder .* is token 115"
    ):
        vtoken.check(model, processor=other)
    tokenizer = AutoTokenizer.from_pretrained(mini.folder("mini-llava"))
    with pytest.raises(ValueError, match="takes no pictures"):
        vtoken.check(model, processor=tokenizer)


def test_a_type_without_known_pixels_asks_for_inputs():
    model = zoo.make("deepseek_vl", (1,)).model
    with pytest.raises(ValueError, match="pass inputs= or processor="):
        vtoken.check(model)


# -------------------------------------------------------------------------------------------------------------- command
def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def long_lists(value):
    """Lists of more than a few numbers, which could be a prompt or a picture."""
    if isinstance(value, dict):
        return [found for part in value.values() for found in long_lists(part)]
    if isinstance(value, list):
        numbers = len(value) > 8 and all(isinstance(part, int | float) for part in value)
        return [value] if numbers else [found for part in value for found in long_lists(part)]
    return []


def test_the_command_examines_an_embedded_model(tmp_path):
    file = tmp_path / "report.json"
    done = run("mini-llava", "-r", "idpruner", "-r", "fastv", "--device", "cpu", "--json", file)
    assert done.exit_code == 0, done.output
    report = Report.model_validate_json(file.read_text())
    assert done.stdout.splitlines()[-1].startswith(
        "vtoken works on LlavaForConditionalGeneration: 14 of 14 checks passed"
    )
    assert "drop = mask" in done.stderr, "progress"
    assert report.found.global_blocks == [0, 1, 2, 3, 4, 5]
    assert statuses(report)["token map"] == statuses(report)["tower map"] == "passed"
    assert report.cost.reducer == "idpruner at 0.25"
    assert report.cost.kv_bytes["reduced"] < report.cost.kv_bytes["unpruned"]
    assert [point["tokens"] for point in report.cost.break_even_points] == [144, 288]
    assert "visual tokens" in next(check.detail for check in report.checks if check.name == "gain")
    assert long_lists(json.loads(file.read_text())) == []
    assert torch.__version__.startswith(report.surroundings["torch"])


@pytest.mark.parametrize(
    ("quartiles", "words"), [((1.9, 2.1), "2.00 times as fast"), ((0.7, 3.0), "too noisy to tell what random at 0.25")]
)
def test_a_noisy_gain_is_no_number(quartiles, words):
    cost = Cost(
        reducer="random at 0.25",
        attention={},
        milliseconds={},
        kv_bytes={},
        tokens={},
        prefill_speedup=2.0,
        prefill_quartiles=quartiles,
        decode_speedup=1.0,
        break_even=None,
    )
    check = Check(name="order", status="passed", detail="")
    report = Report(model="m", checks=[check], cost=cost)
    judge(report)
    assert words in report.verdict
    assert ("2.00" in report.verdict) == (words[0] == "2")


def test_a_report_of_ones_own_prompt_does_not_hold_it():
    model, given = tiny_llava()
    found = json.loads(examined(model, given).model_dump_json())
    assert long_lists(found) == []
    assert found["prompt"]["source"] == "the caller's inputs"


def test_the_command_runs_shapes(tmp_path):
    done = run("llava-tiny", "--random-weights", "--device", "cpu", "--tokens", 64, "-r", "random", "--no-measure")
    assert done.exit_code == 0, done.output
    assert "noise: [64, 32] visual" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("mini-lava",), "Unknown model 'mini-lava'"),
        (("llava-tinny", "--random-weights"), "did you mean 'llava-tiny'"),
        (("mini-llava", "-r", "foprue"), "did you mean 'fopru'"),
        (("mini-llava", "-k", "9.0"), "keep=9.0 is not a ratio"),
        (("mini-llava", "--dtype", "float7"), "Unknown dtype 'float7'"),
        (("mini-llava", "--device", "cuda:77"), "The device 'cuda:77' cannot be used"),
        (("mini-llava", "--attn", "flashy"), "The attention backend 'flashy' cannot be used"),
    ],
)
def test_wrong_arguments_are_sentences(arguments, sentence):
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert sentence in done.stderr
    assert "Traceback" not in done.output
    assert done.stdout == ""


def test_a_text_checkpoint_is_a_sentence(tmp_path):
    text_model().save_pretrained(tmp_path)
    done = run(tmp_path)
    assert done.exit_code == 2
    assert "is of the type 'llama', which is no image-text-to-text model" in done.stderr


def test_what_was_done_before_an_interrupt_is_written(tmp_path, monkeypatch):
    def interrupts(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(examine.decoder, "arguments", interrupts)
    file = tmp_path / "report.json"
    done = run("llava-tiny", "--random-weights", "--device", "cpu", "--tokens", 16, "-r", "random", "--json", file)
    assert done.exit_code == 130
    report = Report.model_validate_json(file.read_text())
    assert [check.name for check in report.checks] == ["placeholders", "token map", "tower map"]
    assert "interrupted" in report.verdict
