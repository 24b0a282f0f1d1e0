# SPDX-License-Identifier: Apache-2.0
"""Under autocast the model runs in half precision; statistics and selections stay in float32."""

from __future__ import annotations

import pytest
import tiny
import torch
from oracles import built
from torch.testing import assert_close

import vtoken
from vtoken import ops
from vtoken.context import Cut
from vtoken.encoder import STATISTICS, TowerCall, read_calls
from vtoken.reducers.base import Reducer


def halved():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", vtoken.list_reducers())
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_every_reducer_keeps_its_budget(family, name):
    model, inputs = tiny.make(family, (1, 2))

    def kept():
        assert model(**inputs).logits.isfinite().all()
        found = [(image.row, image.tokens, image.kept) for image in vtoken.stats(model).images]
        assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 2
        return found

    with vtoken.reduce(model, built(name, 0.5)), torch.no_grad():
        try:
            expected = kept()
        except (ValueError, NotImplementedError) as refused:
            pytest.skip(str(refused))
        with halved():
            assert kept() == expected


class Spy(Reducer):
    """Multiplies float32 numbers at every stage."""

    name = "spy"
    stages = frozenset({"before_llm", "layers"})

    def __init__(self):
        object.__setattr__(self, "found", [])

    def before_llm(self, ctx):
        x = ctx.features.float()
        self.found.append((x @ x.mT).dtype)
        return Cut(ctx.valid)

    def layers(self, depth):
        return (1,)

    def at_layer(self, layer, ctx):
        x = ctx.hidden.float()
        self.found.append((x @ x.mT).dtype)


def test_a_reducer_is_asked_outside_of_autocast():
    model, inputs = tiny.make("llava", (1,))
    spy = Spy()
    with vtoken.reduce(model, spy), torch.no_grad(), halved():
        assert model(**inputs).logits.dtype == torch.bfloat16
    assert spy.found == [torch.float32] * 2


@pytest.mark.parametrize("name", ["k_center", "max_sum", "max_min", "mmr", "sads", "dpp", "coverage"])
def test_picks_are_those_of_float32(name):
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 90, 16, generator=generator), torch.rand(2, 90, generator=generator)
    extra = (w,) if name in ("mmr", "sads", "dpp", "coverage") else ()
    expected = getattr(ops, name)(x, *extra, 40)
    with halved():
        assert torch.equal(getattr(ops, name)(x, *extra, 40), expected)


@pytest.mark.parametrize("what", STATISTICS)
def test_statistics_are_those_of_float32(what):
    query, key = torch.randn(2, 2, 4, 17, 8, generator=torch.Generator().manual_seed(0))
    (expected,) = read_calls(what, [TowerCall(query, key, 0.3)], 1)
    with halved():
        (found,) = read_calls(what, [TowerCall(query, key, 0.3)], 1)
    assert_close(found, expected, rtol=0, atol=0)
