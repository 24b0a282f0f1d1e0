# SPDX-License-Identifier: Apache-2.0
"""``torch.set_default_device`` and ``set_default_dtype`` change a wrapped model as little as a stock one.

Every tensor that the library makes names its device, and its type if that is not one of integers.
"""

from __future__ import annotations

import sys

import pytest
import tiny
import torch
from oracles import TOLERANCE, built
from torch.overrides import TorchFunctionMode

import vtoken
from vtoken import ops

FACTORIES = ("arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "tensor", "zeros")
DRAWS = ("rand", "randint", "randn", "randperm")
every_reducer = pytest.mark.parametrize("name", vtoken.list_reducers())


class Unnamed(TorchFunctionMode):
    """Collects where the library makes tensors without naming device and type."""

    makers = frozenset(getattr(torch, name) for name in FACTORIES + DRAWS)

    def __init__(self):
        super().__init__()
        self.places = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in self.makers and not ("device" in kwargs and ("dtype" in kwargs or not out.is_floating_point())):
            frame = sys._getframe(1)
            while frame.f_globals.get("__name__", "").startswith("torch."):
                frame = frame.f_back
            if frame.f_globals["__name__"].startswith("vtoken."):
                self.places.add(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return out


@pytest.fixture
def unnamed():
    """Fails if the library made a tensor of the default device or type."""
    with Unnamed() as mode:
        yield
    assert mode.places == set()


def answer(model, inputs, name):
    """Logits of a wrapped model, and two words."""
    with vtoken.reduce(model, built(name, 0.5)), torch.no_grad():
        words = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        return model(**inputs).logits, words


def usual_answer(model, inputs, name):
    """The same without anything special; skips where the reducer does not serve this family."""
    try:
        return answer(model, inputs, name)
    except (ValueError, NotImplementedError) as refused:
        pytest.skip(str(refused))


@every_reducer
def test_every_reducer_names_device_and_type(name, unnamed):
    usual_answer(*tiny.make("llava", (1, 2)), name)


@pytest.mark.parametrize("name", ["random", "tower-prune", "fastv"])
@pytest.mark.parametrize("family", sorted(tiny.BUILDERS))
def test_every_family_names_device_and_type(family, name, unnamed):
    usual_answer(*tiny.make(family, (1, 2)), name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@every_reducer
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_another_default_type_changes_nothing(family, name, dtype):
    """Numbers of the default type would also come from a quotient of integers."""
    model, inputs = tiny.make(family, (1, 2))
    expected, usual = usual_answer(model, inputs, name), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = answer(model, inputs, name)
    finally:
        torch.set_default_dtype(usual)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], **TOLERANCE)


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "qwen3_vl", "internvl"])
def test_another_default_device_changes_nothing(family):
    """On a device without data: what is made there by mistake cannot be used."""
    model, inputs = tiny.make(family, (1, 2))
    expected = answer(model, inputs, "random")
    with torch.device("meta"):
        found = answer(model, inputs, "random")
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("family", tiny.CORE)
def test_token_maps_name_device_and_type(family, unnamed):
    model, inputs = tiny.make(family, (1, 2))
    with vtoken.reduce(model, "random", keep=0.5):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert len(vtoken.token_map(model, inputs, [(48, 48)] * 3).sizes) == 3


@pytest.mark.skipif(not tiny.ENCODED_INPUT, reason="transformers < 5.18 takes no encoded pictures")
@pytest.mark.parametrize("family", tiny.CORE)
def test_shorter_prompts_name_device_and_type(family, unnamed):
    model, inputs = tiny.make(family, (1, 2))
    short = vtoken.shorten(model, inputs, "random", keep=0.5)
    assert short["input_ids"].shape[1] < inputs["input_ids"].shape[1]


@pytest.mark.parametrize("tokens", [40, 1100])
@pytest.mark.parametrize("name", ["k_center", "max_sum", "max_min", "mmr", "sads", "dpp"])
def test_every_selection_names_device_and_type(name, tokens, unnamed):
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, tokens, 16, generator=generator), torch.rand(2, tokens, generator=generator)
    extra = (w,) if name in ("mmr", "sads", "dpp") else ()
    assert getattr(ops, name)(x, *extra, 12).shape == (2, 12)
