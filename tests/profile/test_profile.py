# SPDX-License-Identifier: Apache-2.0
"""Profiles: counted quantities are exact, times add up, and the command writes what it shows."""

from __future__ import annotations

import json
import re

import pytest
import tiny as tiny_models
import torch
import zoo
from typer.testing import CliRunner

import vtoken
from vtoken.adapters.synthetic import synthetic_inputs
from vtoken.cli import app
from vtoken.profile import Ratio, Spread, profile, shapes
from vtoken.profile.breakeven import Point, break_even
from vtoken.profile.flops import prefill_flops
from vtoken.profile.measure import count_steps
from vtoken.profile.memory import LiveBytes, peak_bytes
from vtoken.profile.shapes import list_shapes, random_model, shape_config
from vtoken.profile.spread import alternate
from vtoken.wrapping import session_of

TEXT = 32


@pytest.fixture(scope="module")
def tiny():
    return random_model(shape_config("llava-tiny"))


@pytest.fixture(scope="module")
def found(tiny):
    return profile(tiny, vtoken.Random(keep=0.25), synthetic_inputs(tiny, 2, 64), new_tokens=3, rounds=2)


def kv_bytes(config, rows, tokens):
    text = config.text_config
    return rows * tokens * 2 * text.num_hidden_layers * text.hidden_size * 4


def test_tokens_and_cache_are_counted_exactly(tiny, found):
    assert (found.batch, found.unpruned.tokens, found.reduced.tokens) == (2, 64, 16)
    assert found.unpruned.kv_bytes == kv_bytes(tiny.config, 2, 64 + TEXT)
    assert found.reduced.kv_bytes == kv_bytes(tiny.config, 2, 16 + TEXT)
    assert found.reduced.peak_bytes < found.unpruned.peak_bytes


def decoder_flops(config, rows, tokens):
    """Multiplications and additions of a Llama prefill, by hand."""
    text = config.text_config
    width, inner = text.hidden_size, text.intermediate_size
    layer = 2 * tokens * width * (4 * width + 3 * inner) + 4 * tokens * tokens * width
    rotary = 2 * tokens * width // text.num_attention_heads // 2
    return rows * text.num_hidden_layers * layer, rows * (2 * width * text.vocab_size + rotary)


def test_flops_are_those_of_the_decoder(tiny, found):
    for side, tokens in ((found.unpruned, 64), (found.reduced, 16)):
        layers, rest = decoder_flops(tiny.config, 2, tokens + TEXT)
        assert layers <= side.prefill_flops <= layers + rest
    assert found.flop_limit == found.unpruned.prefill_flops / found.reduced.prefill_flops
    if min(found.attention, key=found.attention.get) == "eager":  # it computes all pairs
        assert found.causal_limit == found.flop_limit
    else:
        assert 1 < found.causal_limit < found.flop_limit, "the square part shrinks most"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_future_keys_count_only_where_a_kernel_computes_them(attention):
    model = random_model(shape_config("llava-tiny"))
    model.set_attn_implementation(attention)
    with torch.inference_mode():
        counted, causal = prefill_flops(model, synthetic_inputs(model, 2, 64))
    text, tokens = model.config.text_config, 64 + TEXT
    one_pair = 4 * text.hidden_size * text.num_hidden_layers * 2
    future = tokens * (tokens - 1) // 2
    assert counted - causal == (one_pair * future if attention == "sdpa" else 0)


def test_the_selection_is_no_part_of_the_flops(tiny):
    inputs = synthetic_inputs(tiny, 1, 64)
    counts = []
    for reducer in (vtoken.Random(keep=0.25), vtoken.DivPrune(keep=0.25)):
        with torch.inference_mode(), vtoken.reduce(tiny, reducer):
            counts.append(prefill_flops(tiny, inputs))
    assert counts[0] == counts[1]


def test_phases_add_up_and_the_model_is_left_as_it_was(tiny, found):
    for side in (found.unpruned, found.reduced):
        times = {phase: spread.median for phase, spread in side.milliseconds.items()}
        assert times["prefill"] <= times["first_token"] <= times["end_to_end"]
        assert times["selection"] <= times["prefill"]
        assert min(times["vision"], times["projector"], times["packing"], times["decode"]) > 0
        parts = times["vision"] + times["projector"] + times["packing"] + times["prefill"]
        assert parts == pytest.approx(times["first_token"], rel=0.25), "medians of two runs"
    assert found.unpruned.milliseconds["selection"] == Spread(0.0, 0.0)
    assert found.reduced.milliseconds["selection"].median > 0
    assert set(found.attention) == {"sdpa", "eager"}
    assert session_of(tiny) is None


def test_ratios_are_those_of_the_rounds_in_pairs(found):
    assert set(found.ratios) == {*found.unpruned.milliseconds} - {"selection"}
    for phase, ratio in found.ratios.items():
        assert ratio.value == found.speedup(phase)
        assert ratio.low <= ratio.high


def test_every_run_is_a_step(tiny):
    steps = []
    inputs = synthetic_inputs(tiny, 1, 16)
    profile(tiny, vtoken.Random(keep=0.5), inputs, new_tokens=2, rounds=2, step=lambda: steps.append(1))
    assert len(steps) == count_steps(tiny, rounds=2)


def test_no_hook_and_no_backend_stays_behind(tiny, found):
    def state():  # transformers adds hooks of its own at the first forward pass, which ``found`` has made
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in tiny.modules()]
        return hooks, tiny.config._attn_implementation

    before = state()
    inputs = synthetic_inputs(tiny, 1, 16)
    profile(tiny, vtoken.Random(keep=0.5), inputs, new_tokens=2, rounds=1, warmup=0, attention="eager")
    assert state() == before


@pytest.mark.parametrize(("option", "value"), [("new_tokens", 1), ("rounds", 0)])
def test_what_cannot_be_measured_is_refused(tiny, option, value):
    with pytest.raises(ValueError, match=f"{option}={value}"):
        profile(tiny, vtoken.Random(), synthetic_inputs(tiny, 1, 16), **{option: value})


def test_live_bytes_are_those_alive_at_once():
    def run():
        for _ in range(3):
            x = torch.ones(1000)  # 4000 bytes
            y = (x + 1) * 2  # one temporary of the same size
            x = y[:10].clone()
            del x, y

    assert peak_bytes(run, torch.device("cpu")) == 3 * 4000
    before = torch.ones(1000)
    with LiveBytes() as seen:
        kept = before.view(10, 100).mul_(2)
        assert seen.live == 0
        kept = kept + 1
        assert (seen.live, seen.peak, seen.largest) == (4000, 4000, 4000)
        del kept
        assert seen.live == 0


def test_alternating_runs_are_warm_and_in_turn():
    order = []
    found = alternate({"a": lambda: order.append("a") or len(order), "b": lambda: order.append("b")}, 2, warmup=1)
    assert order == ["a", "b"] * 3
    assert found["a"] == [3, 5]


def test_spread_is_median_and_interquartile_range():
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0)
    assert Spread.of([7.0]) == Spread(7.0, 0.0)


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        ([10, 10, 10, 10, 10], [5, 5, 5, 5, 5], "2.00x"),
        ([10, 10, 10, 10, 10], [5, 5, 5, 5, 500], "2.00x"),  # one round was disturbed
        ([10, 10, 10, 10, 10], [10.3, 9.7, 10, 10.2, 9.8], "1.00x"),  # no gain is a finding
        ([10, 10, 10, 10, 10], [12, 8, 10, 11, 9], "noisy 0.91-1.1x"),  # gain or loss?
        ([10, 10, 10, 10, 10], [2, 4, 1, 8, 3], "noisy 2.5-5x"),  # a gain, but which?
        ([10], [1], "10.00x"),  # one round has no spread
    ],
)
def test_a_ratio_says_when_it_is_noise(before, after, text):
    assert str(Ratio.of(before, after)) == text


def test_a_ratio_pairs_the_rounds():
    """A machine that gets slower meanwhile changes both: neither spread says anything, the ratio does."""
    slow = [10.0, 20.0, 40.0, 80.0]
    assert str(Ratio.of(slow, [each / 2 for each in slow])) == "2.00x"
    assert Ratio.of([4.0, 4.0], [1.0, 2.0], 7.0) == Ratio(7.0, 2.5, 3.5)


def test_break_even_is_where_the_lines_cross():
    # saves 0.1 ms a token from 100 tokens on; the selection takes 5 ms + 0.05 ms a token
    points = [Point(n, 0.1 * n, 10.0 + (5 + 0.05 * n), 5 + 0.05 * n) for n in (200, 400, 800)]
    assert break_even(points) == pytest.approx((5 + 10) / 0.05)
    assert break_even([Point(n, 0.1 * n, 0.01 * n, 0.0) for n in (10, 20)]) == pytest.approx(0.0, abs=1e-6)
    assert break_even([Point(n, 0.1 * n, 0.1 * n + 1, 1.0) for n in (10, 20)]) is None
    with pytest.raises(ValueError, match="two token counts"):
        break_even(points[:1] * 2)


@pytest.mark.parametrize("name", list_shapes())
def test_shapes_are_configurations_that_build(name):
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(shape_config(name))
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    size = re.search(r"-(\d+(?:[.]\d+)?)b\b", name)  # in the names of published models the parameters, in billions
    assert 0.95 * float(size[1]) < billions < 1.26 * float(size[1]) if size else billions < 0.3


@pytest.mark.parametrize(
    ("name", "layers", "kinds"), [("gemma-4-31b", 12, 2), ("qwen3.5-9b", 8, 2), ("llava-1.5-7b", 5, 1)]
)
def test_depth_is_cut_by_whole_patterns_to_fit(name, layers, kinds, monkeypatch):
    made = []
    monkeypatch.setattr(shapes, "random_model", lambda config, **options: made.append(config))
    config = shape_config(name)
    need = shapes._weight_bytes(shapes.with_depth(config, layers), torch.bfloat16)
    monkeypatch.setattr(shapes, "_free_bytes", lambda device: 1.01 * need / shapes.MARGIN)
    _, note = shapes.fitting_model(config, device="cpu", dtype=torch.bfloat16)
    text = made[0].get_text_config()
    assert text.num_hidden_layers == layers
    assert len(set(getattr(text, "layer_types", None) or [""])) == kinds, "every kind of layer is there"
    assert note.startswith(
        f"{layers} of {config.get_text_config().num_hidden_layers} decoder layers, as the whole model"
    )
    monkeypatch.setattr(shapes, "_free_bytes", lambda device: 2.0**60)
    assert shapes.fitting_model(config, device="cpu", dtype=torch.bfloat16)[1] == ""


@pytest.mark.parametrize("family", ["gemma3", "smolvlm", "idefics3", "gemma4"])
def test_noise_has_the_shape_that_the_model_takes(family):
    model = zoo.make(family, (1,)).model if family == "gemma4" else tiny_models.make(family, (1,))[0]
    inputs = synthetic_inputs(model, 2, 30, text=8)
    visual = (inputs["input_ids"] == tiny_models.IMAGE_ID).sum(1).tolist()
    assert visual[0] == visual[1]
    assert abs(visual[0] - 30) <= 3
    with torch.no_grad():
        assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape


def test_unknown_shapes_are_refused_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'llava-tiny'"):
        shape_config("llava-tinny")
    with pytest.raises(ValueError, match="cannot be read"):
        shape_config(str(tmp_path))


def test_a_model_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(vtoken.profile.shapes, "_free_bytes", lambda device: 2.0**30)
    with pytest.raises(ValueError, match="GiB free"):
        random_model(shape_config("llava-1.5-7b"))


def run(*args):
    return CliRunner().invoke(app, ["profile", *map(str, args)])


def test_the_command_profiles_a_shape_and_compares(tmp_path):
    few, many = tmp_path / "few.json", tmp_path / "many.json"
    shape = ("-m", "llava-tiny", "--random-weights", "--tokens", 64, "--new-tokens", 2, "--rounds", 1)
    done = run(*shape, "-r", "random", "-k", "0.25", "--out", few)
    assert done.exit_code == 0, done.output
    assert "selection" in done.output
    report = json.loads(few.read_text())
    assert [point["tokens"] for point in report["break_even_points"]] == [16, 32, 64]
    assert report["reduced"]["tokens"] == 16
    assert torch.__version__.startswith(report["surroundings"]["torch"])
    report["ratios"]["decode"] |= {"low": 0.5, "high": 2.5}
    many.write_text(json.dumps(report))
    shown = run("--compare", few, many)
    assert shown.exit_code == 0
    assert "few" in shown.output
    assert "many" in shown.output
    assert shown.output.count("noisy 0.5-2.5x") == 1


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("-r", "fastvv"), "did you mean"),
        (("-m", "llava-tinny", "--random-weights"), "did you mean"),
        (("-m", "llava-tiny", "--random-weights", "--dtype", "float7"), "float7"),
        (("--compare", "absent.json", "absent.json"), "absent.json"),
    ],
)
def test_wrong_input_is_a_sentence(args, sentence):
    done = run(*args)
    assert done.exit_code == 2
    assert sentence in done.output.replace("\n", " ")
