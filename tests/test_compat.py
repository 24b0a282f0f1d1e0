# SPDX-License-Identifier: Apache-2.0
"""Versions of transformers: which are tested, what is said of others, and names of arguments that changed."""

from __future__ import annotations

import tomllib
import types
import warnings
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from oracles import GREEDY
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

import vtoken
from vtoken import compat


@pytest.fixture(scope="module")
def llava():
    return tiny.make("llava", (1, 2))


# ---------------------------------------------------------------- which versions
def test_pip_refuses_only_what_is_older_than_tested():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"transformers{compat.TESTED.split(',')[0]}" in project["dependencies"]


@pytest.mark.parametrize("version", ["5.25.0", "5.25.0.dev0", "6.1", "5.4.0", "4.57.1"])
def test_an_untried_transformers_is_warned_of_in_one_sentence(version, monkeypatch, llava):
    model, inputs = llava
    monkeypatch.setattr(compat.transformers, "__version__", version)
    with pytest.warns(UserWarning, match="transformers") as caught:
        vtoken.wrap(model, "uniform", keep=0.5)
    try:
        out = model.generate(**inputs, max_new_tokens=2, **GREEDY)
    finally:
        vtoken.unwrap(model)
    assert [str(warning.message) for warning in caught] == [
        f"transformers {version} is outside of >=5.5,<5.25, the versions that vtoken is tested with: if a result looks "
        'odd, pip install "transformers>=5.5,<5.25".'
    ]
    assert caught[0].filename == __file__
    assert out.shape[1] == inputs["input_ids"].shape[1] + 2


@pytest.mark.parametrize("version", ["5.5.0", "5.9.1", "5.23.0", "5.24.1"])
def test_a_tested_one_is_not(version, monkeypatch, llava):
    monkeypatch.setattr(compat.transformers, "__version__", version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vtoken.wrap(llava[0], "uniform", keep=0.5)
    vtoken.unwrap(llava[0])


# ---------------------------------------------------------------- wrong signatures
def renamed_mask(self, hidden_states, mask=None, position_ids=None, past_key_values=None, cache=None, **kwargs):
    return LlamaDecoderLayer.forward(self, hidden_states, attention_mask=mask, **kwargs)


def renamed_cache(self, hidden_states, attention_mask=None, position_ids=None, memory=None, **kwargs):
    return LlamaDecoderLayer.forward(self, hidden_states, attention_mask=attention_mask, **kwargs)


def renamed_embeds(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, embeds=None, **kwargs):
    return LlamaModel.forward(self, input_ids, attention_mask, position_ids, inputs_embeds=embeds, **kwargs)


@pytest.mark.parametrize(
    ("forward", "name"),
    [(renamed_mask, "attention_mask"), (renamed_cache, "past_key_values"), (renamed_embeds, "inputs_embeds")],
)
def test_a_wrong_signature_is_a_sentence_at_wrap(forward, name):
    """Not a shape error in the middle of a pass, and nothing is left on the model."""
    model, inputs = tiny.make("llava", (1,))
    with torch.no_grad():
        wanted = model(**inputs).logits
    decoder = model.model.language_model
    odd, stock = (decoder, LlamaModel) if forward is renamed_embeds else (decoder.layers[-1], LlamaDecoderLayer)
    odd.__class__ = type("Odd", (stock,), {"forward": forward})
    with pytest.raises(NotImplementedError) as caught:
        vtoken.wrap(model, "fastv", keep=0.5)
    assert str(caught.value) == (
        f"Odd.forward takes no argument '{name}', which vtoken has to replace, in transformers "
        f'{transformers.__version__}: pip install "transformers>=5.5,<5.25", and use the model\'s stock class.'
    )
    odd.__class__ = stock
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, wanted)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_states_by_name_are_a_sentence():
    model, inputs = tiny.make("llava", (1,))
    decoder = model.model.language_model

    class ByName(type(decoder.layers[0])):
        def __call__(self, hidden_states, **kwargs):
            return nn.Module.__call__(self, hidden_states=hidden_states, **kwargs)

    decoder.layers[2].__class__ = ByName
    wanted = "ByName is given its hidden states by name and not as the first argument"
    with vtoken.reduce(model, "fastv", keep=0.5), pytest.raises(NotImplementedError, match=wanted):
        model(**inputs)


# ---------------------------------------------------------------- the cache's two names
class Named(nn.Module):
    """Answers with what it was called with."""

    def forward(self, x, **kwargs):
        return types.SimpleNamespace(x=x, kwargs=kwargs)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_hooks_read_one_name_and_answer_in_that_of_the_call(name):
    seen, module = [], Named()

    def act(_, args, kwargs):
        seen.append(kwargs["past_key_values"])
        return (args[0] + 1,), {**kwargs, "mask": None}

    module.register_forward_pre_hook(compat.hook(act), with_kwargs=True)
    found = module(1, other=3, **{name: "kv"})
    assert (found.x, found.kwargs) == (2, {"other": 3, name: "kv", "mask": None})
    assert seen == ["kv"]


def test_a_hook_that_answers_nothing_changes_nothing():
    module = Named()
    module.register_forward_pre_hook(compat.hook(lambda *_: None), with_kwargs=True)
    assert module(1, cache="kv", mask=2).kwargs == {"cache": "kv", "mask": 2}


def test_of_both_names_the_new_one_counts():
    """As transformers 5.24 does it."""
    assert compat.ours({"cache": "new", "past_key_values": "old", "x": 1}) == {"past_key_values": "new", "x": 1}


@pytest.mark.parametrize("name", ["uniform", "fastv", "pyramiddrop", "dyvte", "yopo"])
def test_no_deprecated_name_is_used(llava, name):
    """Neither by hooks nor where a reducer looks at the coming layer, or runs one on the side."""
    model, inputs = llava
    with warnings.catch_warnings(), vtoken.reduce(model, name):
        warnings.simplefilter("error", FutureWarning)
        model.generate(**inputs, max_new_tokens=2, **GREEDY)
        assert vtoken.stats(model).tokens_in == 48


@pytest.mark.skipif(tiny.VERSION < (5, 24), reason="the name is new in transformers 5.24")
@pytest.mark.parametrize("name", ["uniform", "fastv", "pyramiddrop"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_is_found_under_either_name(llava, name, kind):
    model, inputs = llava
    answers = []
    with vtoken.reduce(model, name, keep=0.5):
        for argument in ("past_key_values", "cache"):
            cache = DynamicCache(config=model.config.get_text_config())
            if kind == "static":
                cache = StaticCache(config=model.config.get_text_config(), max_cache_len=120)
            answers.append(model.generate(**inputs, **{argument: cache}, max_new_tokens=4, **GREEDY))
            out = model(**inputs, **{argument: DynamicCache()})
            assert out.cache.layers[-1].get_seq_length() == inputs["input_ids"].shape[1]
            assert out.cache.layers[-1].keys.shape[2] < inputs["input_ids"].shape[1]
    assert torch.equal(*answers)


@pytest.mark.skipif(tiny.VERSION < (5, 24), reason="static caches can be cropped from transformers 5.24 on")
@pytest.mark.parametrize("name", ["uniform", "fastv"])
def test_a_static_cache_is_cropped_behind_its_prompt_only(llava, name):
    model, inputs = llava
    mask, token = inputs["attention_mask"], torch.full((2, 1), 7)

    def step(cache, token, length):
        seen = torch.cat([mask, mask.new_ones(2, length - mask.shape[1])], 1)
        place = seen.cumsum(1)[:, -1:] - 1
        return model(input_ids=token, attention_mask=seen, position_ids=place, cache=cache).logits

    with vtoken.reduce(model, name, keep=0.5), torch.no_grad():
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=120)
        model(**inputs, cache=cache)
        wanted = step(cache, token, mask.shape[1] + 1)
        cache.crop(-1)
        step(cache, token + 5, mask.shape[1] + 1)
        cache.crop(-1)
        assert torch.equal(step(cache, token, mask.shape[1] + 1), wanted)
        with pytest.raises(NotImplementedError, match=r"StaticLayer cannot be cropped into its prompt"):
            cache.crop(-4)
