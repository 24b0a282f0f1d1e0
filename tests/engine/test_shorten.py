# SPDX-License-Identifier: Apache-2.0
"""The hook-free route gives the logits of the wrapped model: the third oracle."""

from __future__ import annotations

import pytest
import tiny
import torch
import zoo
from oracles import PLANS, TOLERANCE, generate
from transformers import CONFIG_MAPPING

import vtoken

STEPS = {"output_logits": True, "return_dict_in_generate": True}
pytestmark = pytest.mark.skipif(not tiny.ENCODED_INPUT, reason="transformers < 5.18 takes no encoded pictures")


def compare(family, reducer, batch=(1, 2), **changes):
    model, inputs = tiny.make(family, batch, **changes)
    params = {"keep": 0.25} if isinstance(reducer, str) else {}
    with vtoken.reduce(model, reducer, positions="keep", **params):
        wanted = generate(model, inputs, 4, **STEPS)
    short = vtoken.shorten(model, inputs, reducer, **params)
    assert short["input_ids"].shape[1] < inputs["input_ids"].shape[1]
    found = generate(model, short, 4, **STEPS)
    assert torch.equal(found.sequences[:, -4:], wanted.sequences[:, -4:])
    for left, right in zip(found.logits, wanted.logits, strict=True):
        torch.testing.assert_close(left, right, **TOLERANCE)


SHORTENABLE = [f for f in tiny.BUILDERS if f not in (*tiny.SLIDING, *tiny.PREFIX)]


@pytest.mark.parametrize("plan", ["before", "drop all"])
@pytest.mark.parametrize("family", SHORTENABLE)
def test_shorter_prompt_equals_wrapped_model(family, plan):
    compare(family, PLANS[plan])


@pytest.mark.parametrize("family", tiny.CORE)
def test_merged_features(family):
    compare(family, "tome")


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_shorter_clips(family):
    compare(family, PLANS["before"], video=True)


SENTENCES = {
    **dict.fromkeys(zoo.PICTURED, "takes pixels beside a prompt"),
    "granite4_vision": "adds its visual features between decoder layers",
    **dict.fromkeys(("inkling_mm_model", "inkling2"), "counts distances between tokens by the rows that are there"),
    "minimax_m3_vl": "finds them by position ids, which must have no gaps",
}
"""Why a type's prompts cannot be shortened, beside windows."""


@pytest.mark.parametrize("family", [family for family in zoo.BUILDERS if family in CONFIG_MAPPING])
def test_types_by_convention(family):
    """The stock model on the short prompt gives what the wrapped one gives, or a sentence says why it would not."""
    case = zoo.make(family, (2,))
    config = case.model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    wanted = SENTENCES.get(family)
    slides = any("ing" in kind or "chunk" in kind for kind in getattr(config, "layer_types", None) or ())
    if wanted is None and any(windows) and slides:
        wanted = "use vtoken.wrap, which knows the original distances"
    if wanted is not None:
        with pytest.raises(NotImplementedError, match=wanted):
            vtoken.shorten(case.model, case.inputs, "random", keep=0.5)
        return
    with vtoken.reduce(case.model, "random", keep=0.5, **zoo.positions(family)), torch.no_grad():
        whole = case.model(**case.inputs).logits[:, -1]
    short = vtoken.shorten(case.model, case.inputs, "random", keep=0.5)
    assert short["input_ids"].shape[1] < case.inputs["input_ids"].shape[1]
    with torch.no_grad():
        torch.testing.assert_close(case.model(**short).logits[:, -1], whole, **TOLERANCE)


@pytest.mark.parametrize("family", tiny.SLIDING)
def test_a_prompt_beyond_the_window_is_refused(family):
    """The stock model would count the window over what is left, and answer something else without a word."""
    model, inputs = tiny.make(family, (1, 2))
    assert inputs["input_ids"].shape[1] > model.config.get_text_config().sliding_window
    with pytest.raises(NotImplementedError, match=r"exceeds a sliding window of .* tokens.*use vtoken.wrap"):
        vtoken.shorten(model, inputs, "random", keep=0.5)


def test_refusals():
    model, inputs = tiny.make("llava", (1,))
    with pytest.raises(ValueError, match="acts inside of the language model"):
        vtoken.shorten(model, inputs, PLANS["inside"])
    with vtoken.reduce(model, "random", keep=0.5), pytest.raises(ValueError, match="wrapped"):
        vtoken.shorten(model, inputs, "random", keep=0.5)
    short = vtoken.shorten(model, inputs, "random", keep=0.5)
    other, _ = tiny.make("llava", (1,))
    with vtoken.reduce(other, "random", keep=0.5), pytest.raises(NotImplementedError, match="mm_encoder_outputs"):
        other.generate(**short, max_new_tokens=2)
