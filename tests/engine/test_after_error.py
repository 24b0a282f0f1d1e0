# SPDX-License-Identifier: Apache-2.0
"""After any error, interrupt or dead thread the next call of a wrapped model works, from whichever thread it comes.

Oracle: the answer of the same wrapped model before the error; and what hangs on the modules before it was wrapped.
"""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import tiny
import torch
from caches import model_of, new_cache, outcome, prefill, prompt_of, sequence_of, text, turn
from cases import FEW, pairs
from oracles import PLANS, TestReducer, built, generate, language_model

import vtoken

CASES = list(dict.fromkeys([*pairs(("llava",)), *pairs(tiny.CORE, FEW)]))
SENTENCE = "Two threads are running one wrapped model"


def layer(number):
    return lambda model: language_model(model).layers[number]


PLACES = {
    "tower": lambda model: getattr(model.model, "vision_tower", None) or model.model.visual,
    "projector": lambda model: getattr(model.model, "multi_modal_projector", None) or model.model.visual.merger,
    "first layer": layer(0),
    "attention of a layer": lambda model: layer(2)(model).self_attn,
    "middle layer": layer(1),
    "last layer": layer(-1),
    "head": lambda model: model.lm_head,
}
DECODING = ("first layer", "last layer", "head")
"""Places that a decode step passes, too."""


class Boom(Exception):
    pass


def explode(module, error, call=1):
    """Let the ``call``-th forward pass of a module from now on raise ``error``, and no other."""
    left = [call]

    def hook(*args):
        left[0] -= 1
        if left[0] == 0:
            handle.remove()
            raise error

    handle = module.register_forward_pre_hook(hook)
    return handle


def attached(model):
    """Everything that a wrap may leave behind: hooks, attributes and the very objects of the configuration."""
    return {
        name: (
            sorted(vars(module)),
            id(getattr(module, "config", None)),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._forward_hooks_with_kwargs),
            len(module._forward_pre_hooks_with_kwargs),
            len(module._forward_hooks_always_called),
        )
        for name, module in model.named_modules()
    }


def run(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


class Here:
    """This thread, as an executor."""

    @staticmethod
    def submit(call, *args):
        done = Future()
        done.set_result(call(*args))
        return done


@pytest.fixture(scope="module")
def other():
    """A thread that stays alive between calls, as those of a server do."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        yield pool


def failures_at(model, inputs, wanted, other, make, call=1, places=PLACES):
    """What is wrong after an error at each place: the next calls come from this thread and another, in turn first."""
    wrong = {}
    for number, place in enumerate(places):
        error = make()
        handle = explode(places[place](model), error, call)
        order = (Here, other) if number % 2 else (other, Here)
        try:
            with pytest.raises(type(error)) as found:
                generate(model, inputs, 3) if call > 1 else run(model, inputs)
            assert found.value is error or error in (found.value.__cause__, found.value.__context__)
            for thread in order:
                assert torch.equal(thread.submit(run, model, inputs).result(60), wanted), "another answer"
        except (Exception, KeyboardInterrupt) as problem:
            wrong[place] = f"{type(problem).__name__}: {problem}"[:200]
        finally:
            handle.remove()
    return wrong


@contextlib.contextmanager
def wrapped_and_checked(model, inputs, reducer):
    """A wrapped model whose ``unwrap`` must leave no trace, and must give the unwrapped answer again."""
    stock, before = run(model, inputs), attached(model)
    vtoken.wrap(model, reducer)
    try:
        yield run(model, inputs)
    finally:
        vtoken.unwrap(model)
    assert attached(model) == before
    assert torch.equal(run(model, inputs), stock)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_an_error_in_a_prefill(family, name, other):
    model, inputs = model_of(family), prompt_of(family, (1, 2))
    with wrapped_and_checked(model, inputs, built(name, 0.5)) as wanted:
        wrong = failures_at(model, inputs, wanted, other, lambda: Boom("boom"))
    assert not wrong


@pytest.mark.parametrize(("family", "name"), pairs(("llava", "qwen3_vl", "internvl"), FEW))
def test_an_error_in_a_decode_step(family, name, other):
    model, inputs = model_of(family), prompt_of(family, (1, 2))
    places = {place: PLACES[place] for place in DECODING}
    with wrapped_and_checked(model, inputs, built(name, 0.5)) as wanted:
        wrong = failures_at(model, inputs, wanted, other, lambda: Boom("boom"), 2, places)
    assert not wrong


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("family", "name"), pairs(("llava", "qwen2_5_vl"), FEW))
def test_an_interrupt(family, name, kind, other):
    model, inputs = model_of(family), prompt_of(family, (1, 2))
    with wrapped_and_checked(model, inputs, built(name, 0.5)) as wanted:
        wrong = failures_at(model, inputs, wanted, other, kind)
    assert not wrong


@pytest.mark.parametrize("place", ["tower", "attention of a layer", "last layer", "head"])
@pytest.mark.parametrize(("family", "name"), pairs(("llava", "qwen3_vl"), FEW))
def test_unwrap_right_after_an_error(family, name, place):
    """No further call cleans up."""
    model, inputs = model_of(family), prompt_of(family, (1, 2))
    stock, before = run(model, inputs), attached(model)
    with vtoken.reduce(model, built(name, 0.5)):
        explode(PLACES[place](model), Boom("boom"))
        with pytest.raises(Boom):
            run(model, inputs)
    assert attached(model) == before
    assert torch.equal(run(model, inputs), stock)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FEW)
def test_what_is_tapped_is_given_back_with_the_error(name, place):
    """Between the error and the next call the attention blocks have their own configuration again."""
    model, inputs = model_of("llava"), prompt_of("llava", (1, 2))
    with vtoken.reduce(model, built(name, 0.5)):
        run(model, inputs)
        before = {part: id(module.config) for part, module in model.named_modules() if hasattr(module, "config")}
        explode(PLACES[place](model), Boom("boom"))
        with pytest.raises(Boom):
            run(model, inputs)
        after = {part: id(module.config) for part, module in model.named_modules() if hasattr(module, "config")}
    assert after == before


# ---------------------------------------------------------------- errors of reducers, inputs and callers
@dataclass(frozen=True)
class Fragile(TestReducer):
    """Raises what lies in ``fuse``, once, before the language model (``early``) or at a layer."""

    name = "fragile"
    early: bool = True
    fuse: list = field(default_factory=list)

    def before_llm(self, ctx):
        if self.early and self.fuse:
            raise self.fuse.pop()
        return super().before_llm(ctx)

    def at_layer(self, layer, ctx):
        if not self.early and self.fuse:
            raise self.fuse.pop()
        return super().at_layer(layer, ctx)


@pytest.mark.parametrize("kind", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("early", [True, False], ids=["before_llm", "at_layer"])
@pytest.mark.parametrize("family", tiny.CORE)
def test_an_error_of_the_reducer(family, early, kind, other):
    model, inputs = model_of(family), prompt_of(family, (1, 2))
    reducer = Fragile(before=0.7, at=((2, 0.4),), early=early)
    with wrapped_and_checked(model, inputs, reducer) as wanted:
        for ask in (lambda: run(model, inputs), lambda: other.submit(run, model, inputs).result(60)):
            reducer.fuse.append(kind("boom"))
            with pytest.raises(kind):
                run(model, inputs)
            assert torch.equal(ask(), wanted)


def bad_inputs(inputs):
    """Arguments that models or reducers refuse, in tower, merge, embedding and choice."""
    first = int((inputs["input_ids"][-1] == tiny.IMAGE_ID).nonzero()[0])
    fewer, unknown = inputs["input_ids"].clone(), inputs["input_ids"].clone()
    fewer[-1, first], unknown[-1, -1] = 50, 10**6
    return {
        "a placeholder is missing": {**inputs, "input_ids": fewer},
        "a token that does not exist": {**inputs, "input_ids": unknown},
        "pixels of another shape": {**inputs, "pixel_values": inputs["pixel_values"][..., :-1]},
        "no batch": {**inputs, "input_ids": inputs["input_ids"][:0], "attention_mask": inputs["attention_mask"][:0]},
        "an argument of no use": {**inputs, "labels": inputs["input_ids"][:, :-3]},
        "nothing": {},
    }


@pytest.mark.parametrize("name", [*FEW, "fopru", "uniform 1.0"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_bad_inputs(family, name, other):
    """The request that fails locks nobody out, not even where nothing is reduced."""
    model, inputs = model_of(family), prompt_of(family, (1, 2))
    reducer = built("uniform", 1.0) if name == "uniform 1.0" else built(name, 0.5)
    failed, wrong = 0, {}
    with wrapped_and_checked(model, inputs, reducer) as wanted:
        for what, bad in bad_inputs(inputs).items():
            for ask in (lambda: run(model, inputs), lambda: other.submit(run, model, inputs).result(60)):
                try:
                    run(model, bad)
                except Exception:
                    failed += 1
                try:
                    assert torch.equal(ask(), wanted), "another answer"
                except Exception as problem:
                    wrong[what] = f"{type(problem).__name__}: {problem}"[:200]
    assert failed >= 8, "so many of these inputs are bad"
    assert not wrong


@pytest.mark.parametrize("name", FEW)
def test_pixels_that_are_not_finite(name, other):
    """Those whose scores are refused leave the next request alone; the others run."""
    model, inputs = model_of("llava"), prompt_of("llava", (1, 2))
    bad = {**inputs, "pixel_values": inputs["pixel_values"] * float("nan")}
    with wrapped_and_checked(model, inputs, built(name, 0.5)) as wanted:
        with contextlib.suppress(ValueError):
            run(model, bad)
        assert torch.equal(other.submit(run, model, inputs).result(60), wanted)
        assert torch.equal(run(model, inputs), wanted)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_an_error_while_a_picture_is_encoded_alone(family, name, other):
    """``get_image_features`` as a call of its own, outside of a forward pass."""
    model, inputs = model_of(family), prompt_of(family, (1, 2))
    arguments = {key: inputs[key] for key in ("pixel_values", "image_grid_thw") if key in inputs}
    with wrapped_and_checked(model, inputs, built(name, 0.5)) as wanted:
        for ask in (lambda: run(model, inputs), lambda: other.submit(run, model, inputs).result(60)):
            explode(PLACES["tower"](model), Boom("boom"))
            with pytest.raises(Boom), torch.no_grad():
                model.model.get_image_features(**arguments)
            assert torch.equal(ask(), wanted)


@pytest.mark.parametrize("name", FEW)
def test_an_error_between_two_steps(name, other):
    """A stopping criterion or a streamer of the caller that raises."""
    model, inputs = model_of("llava"), prompt_of("llava", (1, 2))

    def stop(ids, scores, **kwargs):
        raise Boom("boom")

    with wrapped_and_checked(model, inputs, built(name, 0.5)) as wanted:
        with pytest.raises(Boom):
            generate(model, inputs, 3, stopping_criteria=[stop])
        assert torch.equal(other.submit(run, model, inputs).result(60), wanted)
        assert torch.equal(run(model, inputs), wanted)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("place", PLACES)
def test_a_cache_that_an_error_left_half_filled(name, place):
    """Layers above the error have no columns of the failed prompt: after ``reset`` the cache is as new."""
    model, inputs = model_of("llava"), prompt_of("llava", (1, 2))
    with vtoken.reduce(model, built(name, 0.5)), torch.no_grad():
        wanted = run(model, inputs, past_key_values=new_cache(model))
        cache = new_cache(model)
        explode(PLACES[place](model), Boom("boom"))
        with pytest.raises(Boom):
            prefill(model, inputs, cache)
        cache.reset()
        assert torch.equal(run(model, inputs, past_key_values=cache), wanted)


# ---------------------------------------------------------------- threads
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FEW)
def test_a_thread_that_dies_in_the_middle(name, place):
    model, inputs = model_of("llava"), prompt_of("llava", (1, 2))
    with wrapped_and_checked(model, inputs, built(name, 0.5)) as wanted:
        explode(PLACES[place](model), SystemExit())
        thread = threading.Thread(target=run, args=(model, inputs))
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
        assert torch.equal(run(model, inputs), wanted)


@contextlib.contextmanager
def held(module):
    """(reached, go on): the next forward pass of a module waits until it is told to go on."""
    reached, go_on, once = threading.Event(), threading.Event(), [True]

    def hook(*args):
        if once and once.pop():
            reached.set()
            go_on.wait(60)

    handle = module.register_forward_pre_hook(hook)
    try:
        yield reached, go_on
    finally:
        go_on.set()
        handle.remove()


@pytest.mark.parametrize("place", ["tower", "first layer", "middle layer", "last layer"])
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_two_threads_at_once_are_refused(family, name, place, other):
    """While one is inside: a sentence for the second, the right answer for the first, and both work afterwards."""
    model, inputs = model_of(family), prompt_of(family, (1, 2))
    with wrapped_and_checked(model, inputs, built(name, 0.5)) as wanted:
        with held(PLACES[place](model)) as (reached, go_on):
            first = other.submit(run, model, inputs)
            assert reached.wait(60)
            with pytest.raises(RuntimeError, match=SENTENCE):
                run(model, inputs)
            go_on.set()
            assert torch.equal(first.result(60), wanted)
        assert torch.equal(run(model, inputs), wanted)
        assert torch.equal(other.submit(run, model, inputs).result(60), wanted)


@pytest.mark.parametrize("name", FEW)
def test_a_second_thread_while_the_first_is_behind_the_decoder(name, other):
    """Right or refused, and never another answer for either."""
    model, inputs = model_of("llava"), prompt_of("llava", (1, 2))
    with wrapped_and_checked(model, inputs, built(name, 0.5)) as wanted:
        with held(model.lm_head) as (reached, go_on):
            first = other.submit(run, model, inputs)
            assert reached.wait(60)
            found, error = outcome(lambda: run(model, inputs))
            assert SENTENCE in str(error) if error else torch.equal(found, wanted)
            go_on.set()
            assert torch.equal(first.result(60), wanted)
        assert torch.equal(run(model, inputs), wanted)


@pytest.mark.parametrize("name", FEW)
def test_a_decode_step_while_another_thread_prefills(name, other):
    """The refused step changes nothing: asked again, the cache goes on as it would have."""
    model, inputs = model_of("llava"), prompt_of("llava", (1, 2))
    prompt, token = sequence_of(model, inputs), text(2, 1)
    with wrapped_and_checked(model, inputs, built(name, 0.5)) as wanted, torch.no_grad():
        right, _ = turn(model, prompt, prefill(model, inputs), token)
        cache = prefill(model, inputs)
        with held(PLACES["middle layer"](model)) as (reached, go_on):
            first = other.submit(run, model, inputs)
            assert reached.wait(60)
            with pytest.raises(RuntimeError, match=SENTENCE):
                turn(model, prompt, cache, token)
            go_on.set()
            assert torch.equal(first.result(60), wanted)
        assert torch.equal(turn(model, prompt, cache, token)[0], right)


@pytest.mark.parametrize("plan", PLANS)
def test_a_refused_thread_does_not_take_over(plan, other):
    """The thread that was refused raises again and again, until the first is done."""
    model, inputs = model_of("qwen2_5_vl"), prompt_of("qwen2_5_vl", (1, 2))
    with wrapped_and_checked(model, inputs, PLANS[plan]) as wanted:
        with held(PLACES["first layer"](model)) as (reached, go_on):
            first = other.submit(run, model, inputs)
            assert reached.wait(60)
            for _ in range(3):
                with pytest.raises(RuntimeError, match=SENTENCE):
                    run(model, inputs)
            go_on.set()
            assert torch.equal(first.result(60), wanted)
        assert torch.equal(run(model, inputs), wanted)
