# SPDX-License-Identifier: Apache-2.0
"""Attention backends, compilers and wrappers of a model: each as without vtoken, or a sentence.

Oracles: the same wrapped model under SDPA; eager ``output_attentions`` of the unwrapped model; the unwrapped model
under the same compiler; and a backend of ``torch.compile`` that counts its graphs.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, field

import flash
import pytest
import tiny
import torch
from caches import model_of, outcome, prompt_of
from oracles import TOLERANCE, built, generate, language_model, visual_and_real
from transformers import CompileConfig

import vtoken
from vtoken.reducers.base import Reducer

SENTENCE = r"(?s)vtoken.*\."


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def reduced(model, name, keep=0.5):
    return contextlib.nullcontext() if name is None else vtoken.reduce(model, built(name, keep))


# ---------------------------------------------------------------- flex attention
@pytest.mark.parametrize("family", ["llava", "internvl"])  # the Qwen models do not support it themselves
def test_flex_attention(family):
    """Block masks: the unwrapped model first, then everything kept, then cuts before and inside of the decoder.

    The kernel runs without its compiler, which takes minutes on a CPU; masks and scores are the same.
    """
    model, inputs = tiny.make(family, (1, 2))
    real = visual_and_real(inputs)[1]
    runs = [(None, 0.5), ("uniform", 1.0), ("uniform", 0.5), ("fastv", 0.5), ("pyramiddrop", 0.5)]
    answers = {}
    for attention in ("sdpa", "flex_attention"):
        language_model(model).set_attn_implementation(attention)
        for name, keep in runs:
            with reduced(model, name, keep), torch.compiler.set_stance("force_eager"):
                answers[attention, name, keep] = run(model, inputs)[real]
    assert torch.equal(answers["flex_attention", "uniform", 1.0], answers["flex_attention", None, 0.5])
    for name, keep in runs:
        found, wanted = (answers[attention, name, keep] for attention in ("flex_attention", "sdpa"))
        torch.testing.assert_close(found, wanted, **TOLERANCE)


# ---------------------------------------------------------------- taps in sliding windows
@dataclass(frozen=True)
class Probe(Reducer):
    """Keeps everything and notes the attention rows that it reads."""

    name = "probe"
    rows: str = "last"
    at: tuple[int, ...] = (0, 1, 2)
    seen: dict = field(default_factory=dict)

    def taps(self, depth):
        return dict.fromkeys(self.at, self.rows)

    def layers(self, depth):
        return (max(self.at) + 1,)

    def at_layer(self, layer, ctx):
        for tapped in self.at:
            self.seen[tapped] = ctx.attention[tapped].probabilities.clone(), ctx.attention[tapped].valid.clone()


@dataclass(frozen=True)
class Peek(Probe):
    """The same of the layer that comes next."""

    name = "peek"

    def taps(self, depth):
        return {}

    def layers(self, depth):
        return self.at

    def at_layer(self, layer, ctx):
        found = ctx.peek(self.rows)
        self.seen[layer] = found.probabilities.clone(), found.valid.clone()


def question(inputs, rows):
    """Per batch row the columns whose attention rows are read: the last text token, or all behind the picture."""
    visual, real = visual_and_real(inputs)
    out = []
    for picture, valid in zip(visual, real, strict=True):
        text = (valid & ~picture).nonzero()[:, 0]
        after = text[text > int(picture.nonzero()[-1])]
        out.append({"last": text[-1:], "question": after, "text": text}[rows])
    return out


def check_probe(model, inputs, probe, weights):
    """Real rows equal those of eager attention, which knows the window."""
    real = visual_and_real(inputs)[1]
    assert set(probe.seen) == set(probe.at)
    for layer, (found, valid) in probe.seen.items():
        for row, queries in enumerate(question(inputs, probe.rows)):
            mine = found[row][:, valid[row]]
            wanted = weights[layer][row][:, queries]
            assert mine.shape[1] == len(queries)
            torch.testing.assert_close(mine[..., real[row]], wanted[..., real[row]], **TOLERANCE)
            assert not mine[..., ~real[row]].any()


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash"])
@pytest.mark.parametrize("rows", ["last", "question", "text"])
@pytest.mark.parametrize("kind", [Probe, Peek])
@pytest.mark.parametrize("batch", [(1,), (1, 2)], ids=str)
@pytest.mark.parametrize("family", [*tiny.SLIDING, "llava", "qwen2_5_vl"])
def test_taps_see_the_window(family, batch, kind, rows, attention, monkeypatch):
    """Layers 0 and 2 slide over 14 tokens, layer 1 sees everything; the prompts are longer."""
    model, inputs = tiny.make(family, batch)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True, use_cache=False).attentions
    if family in tiny.SLIDING:
        last = weights[0][-1, :, -1]
        assert inputs["input_ids"].shape[1] > 15
        assert not last[:, :-14].any(), "the oracle itself knows the window"
        assert weights[1][-1, :, -1, :-14].any()
    if attention == "flash":
        flash.install(monkeypatch, model)
    else:
        model.set_attn_implementation(attention)
    # the stand-in kernel knows no window, so that only what the first layer reads is the eager model's
    probe = kind(rows=rows, at=(0,) if attention == "flash" and family in tiny.SLIDING else (0, 1, 2))
    with vtoken.reduce(model, probe):
        _, error = outcome(lambda: run(model, inputs))
    if error is not None:
        assert attention == "flash", error
        assert "sliding window" in str(error), error
        return
    check_probe(model, inputs, probe, weights)


# ---------------------------------------------------------------- a compiled decode step
class Counting:
    """A backend of ``torch.compile`` that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __deepcopy__(self, memo):
        """``generate`` copies its configuration: all copies count together."""
        return self

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


def prompts_of(family):
    """One row each, of different lengths and numbers of pictures."""
    return [prompt_of(family, (1,)), prompt_of(family, (2,)), prompt_of(family, (3,)), prompt_of(family, (1,), seed=3)]


@pytest.mark.parametrize("name", [None, "uniform", "fastv"])  # tracing a model takes half a minute
def test_a_decode_step_compiles_once(name):
    """After the second prompt nothing is compiled any more, and the ids are those without a compiler."""
    family, counting, counts = "llava", Counting(), []
    model = copy.deepcopy(model_of(family))
    config = CompileConfig(backend=counting, mode=None, fullgraph=False)
    config._compile_all_devices = True
    with reduced(model, name):
        for inputs in prompts_of(family):
            wanted = generate(model, inputs, 4)
            options = {"cache_implementation": "static", "compile_config": config}
            longest = max(x["input_ids"].shape[1] for x in prompts_of(family)) + 4
            options |= {"max_length": longest, "stopping_criteria": [after(inputs, 4)]}
            found = generate(model, inputs, None, **options)
            counts.append(counting.graphs)
            assert torch.equal(found, wanted)
    assert counts[0] > 0
    assert counts[-1] == counts[1], counts


def after(inputs, tokens):
    """Stops after so many tokens, so that all prompts can have a buffer of one length."""
    length = inputs["input_ids"].shape[1] + tokens
    return lambda ids, scores, **kwargs: torch.full((len(ids),), ids.shape[1] >= length)


# ---------------------------------------------------------------- whole graphs
@pytest.mark.parametrize("family", ["llava"])
def test_fullgraph_when_everything_is_kept(family):
    model, inputs = model_of(family), prompt_of(family)
    wanted = run(model, inputs, use_cache=False)
    with vtoken.reduce(model, "uniform", keep=1.0):
        found = run(torch.compile(model, fullgraph=True, backend="eager"), inputs, use_cache=False)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["fastv"])
def test_fullgraph_is_refused_where_tokens_are_dropped(name):
    model, inputs = model_of("llava"), prompt_of("llava")
    with vtoken.reduce(model, built(name, 0.5)):
        wanted = run(model, inputs)
        with pytest.raises(Exception, match=SENTENCE) as found:
            run(torch.compile(model, fullgraph=True, backend="eager"), inputs, use_cache=False)
        assert "fullgraph" in str(found.value)
        assert torch.equal(run(model, inputs), wanted)


def exported(model, inputs):
    with torch.no_grad():
        return torch.export.export(model, (), {**inputs, "use_cache": False}, strict=False).module()


def test_export_when_everything_is_kept():
    model, inputs = model_of("llava"), prompt_of("llava")
    with vtoken.reduce(model, "uniform", keep=1.0):
        found = run(exported(model, inputs), inputs, use_cache=False)
    assert torch.equal(found, run(model, inputs))


@pytest.mark.parametrize("name", ["uniform"])
def test_export_is_refused_where_tokens_are_dropped(name):
    """A graph with the choice of one prompt burnt in would be wrong for the next."""
    model, inputs = model_of("llava"), prompt_of("llava")
    with vtoken.reduce(model, built(name, 0.5)):
        wanted = run(model, inputs)
        with pytest.raises(Exception, match=SENTENCE) as found:
            exported(model, inputs)
        assert "export" in str(found.value)
        assert torch.equal(run(model, inputs), wanted)


# ---------------------------------------------------------------- what is handed to wrap
@contextlib.contextmanager
def group(path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


every_family = pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
every_name = pytest.mark.parametrize("name", ["uniform", "fastv", "todre"])


def of_the_plain_model(family, name, batch=(1, 2)):
    model, inputs = copy.deepcopy(model_of(family)), prompt_of(family, batch)
    stock = run(model, inputs)
    with vtoken.reduce(model, built(name, 0.5)):
        pruned = run(model, inputs)
    assert not torch.allclose(pruned, stock, atol=1e-3)
    return model, inputs, stock, pruned


@pytest.mark.parametrize(("family", "name"), [("llava", "uniform"), ("llava", "fastv"), ("qwen2_5_vl", "uniform")])
def test_wrap_of_a_compiled_model(family, name):
    model, inputs, stock, wanted = of_the_plain_model(family, name)
    compiled = torch.compile(model, backend="eager")
    assert vtoken.wrap(compiled, built(name, 0.5)) is compiled
    torch.testing.assert_close(run(compiled, inputs), wanted, **TOLERANCE)
    assert vtoken.stats(compiled).tokens_in > 0
    vtoken.unwrap(compiled)
    torch.testing.assert_close(run(compiled, inputs), stock, **TOLERANCE)


@pytest.mark.parametrize("handle", ["compiled", "inner"])
@pytest.mark.parametrize("name", ["fastv"])
def test_a_model_that_was_compiled_and_run_before(name, handle):
    """Graphs of before the wrap, without any hook, must not answer after it; nor those of the wrap after ``unwrap``."""
    model, inputs, stock, wanted = of_the_plain_model("llava", name)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(run(compiled, inputs), stock, **TOLERANCE)
    given = compiled if handle == "compiled" else model
    vtoken.wrap(given, built(name, 0.5))
    torch.testing.assert_close(run(compiled, inputs), wanted, **TOLERANCE)
    vtoken.unwrap(given)
    torch.testing.assert_close(run(compiled, inputs), stock, **TOLERANCE)


@pytest.mark.parametrize("name", ["fastv"])
def test_a_model_that_was_compiled_in_place_before(name):
    """``module.compile()`` keeps the module, and replaces what calls it."""
    model, inputs, stock, wanted = of_the_plain_model("llava", name)
    model.compile(backend="eager")
    torch.testing.assert_close(run(model, inputs), stock, **TOLERANCE)
    vtoken.wrap(model, built(name, 0.5))
    torch.testing.assert_close(run(model, inputs), wanted, **TOLERANCE)
    vtoken.unwrap(model)
    torch.testing.assert_close(run(model, inputs), stock, **TOLERANCE)


@every_name
@pytest.mark.parametrize("family", tiny.CORE)
def test_wrap_of_a_base_model(family, name):
    """``AutoModel``: no head; its states give the logits of the whole model."""
    model, inputs, stock, wanted = of_the_plain_model(family, name)
    base = model.model
    before = len(base._forward_pre_hooks)
    assert vtoken.wrap(base, built(name, 0.5)) is base
    with torch.no_grad():
        states = base(**inputs).last_hidden_state
        found = model.lm_head(states)
    assert vtoken.stats(base).tokens_in > 0
    vtoken.unwrap(base)
    short = found.shape[1] != wanted.shape[1]  # without a head nobody asks for the length of labels
    compared = (found[:, -1], wanted[:, -1]) if short else (found, wanted)
    torch.testing.assert_close(*compared, **TOLERANCE)
    assert len(base._forward_pre_hooks) == before
    torch.testing.assert_close(run(model, inputs), stock, **TOLERANCE)


@every_name
@every_family
def test_wrap_of_a_distributed_model(family, name, tmp_path):
    """The wrapper of one process: the same logits, loss and gradients as without it."""
    model, inputs, stock, wanted = of_the_plain_model(family, name)
    labels = inputs["input_ids"].masked_fill(visual_and_real(inputs)[0], -100)
    with vtoken.reduce(model, built(name, 0.5)):
        model(**inputs, labels=labels, use_cache=False).loss.backward()
    expected = {part: p.grad.clone() for part, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with group(tmp_path):
        parallel = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        assert vtoken.wrap(parallel, built(name, 0.5)) is parallel
        torch.testing.assert_close(run(parallel, inputs), wanted, **TOLERANCE)
        assert vtoken.stats(parallel).tokens_in > 0
        parallel(**inputs, labels=labels, use_cache=False).loss.backward()
        found = {part: p.grad for part, p in model.named_parameters() if p.grad is not None}
        vtoken.unwrap(parallel)
        torch.testing.assert_close(run(parallel, inputs), stock, **TOLERANCE)
    for part, gradient in expected.items():
        torch.testing.assert_close(found[part], gradient, atol=1e-5, rtol=1e-3, msg=part)


def test_wrapping_the_inside_and_the_outside_is_one_wrap():
    """What is wrapped under one handle is wrapped under the other: a second wrap is refused with the sentence."""
    model, _, _, _ = of_the_plain_model("llava", "uniform")
    compiled = torch.compile(model, backend="eager")
    vtoken.wrap(compiled, "uniform", keep=0.5)
    with pytest.raises(ValueError, match="wrapped already"):
        vtoken.wrap(model, "uniform", keep=0.5)
    vtoken.unwrap(compiled)
    with pytest.raises(ValueError, match="not wrapped"):
        vtoken.unwrap(compiled)
