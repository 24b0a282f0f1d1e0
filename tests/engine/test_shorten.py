# SPDX-License-Identifier: Apache-2.0
"""The hook-free route gives the logits of the wrapped model: the third oracle."""

from __future__ import annotations

import pytest
import tiny
import torch
from oracles import PLANS, TOLERANCE, generate

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
