# SPDX-License-Identifier: Apache-2.0
"""Training a wrapped model: gradient checkpointing changes no gradient, and router losses count real tokens only.

Oracles: the gradients of the same wrapped model without checkpointing; for routers, the balancing loss written out from
the logits that hooks on the gates record while each row runs alone, where there is no padding.
"""

from __future__ import annotations

import functools

import pytest
import tiny
import torch
from caches import model_of, outcome, prompt_of
from cases import pairs
from oracles import alone, built, visual_and_real

import vtoken

LIGHT = ("yopo", "ima")
MODES = {"default": None, "reentrant": {"use_reentrant": True}, "not reentrant": {"use_reentrant": False}}
UNCHANGED = [(family, None) for family in tiny.CORE]
BATCH = (1, 2)


def labels_of(inputs):
    visual, real = visual_and_real(inputs)
    return inputs["input_ids"].masked_fill(visual | ~real, -100)


class Trained:
    """The model in training mode, wrapped (not with ``name=None``), with checkpointing in a mode (None: without)."""

    def __init__(self, family, name, mode=None):
        self.model, self.name, self.mode = model_of(family), name, mode

    def __enter__(self):
        self.model.train()
        if self.mode is not None:
            self.model.gradient_checkpointing_enable(MODES[self.mode])
        if self.name is not None:
            vtoken.wrap(self.model, built(self.name, 0.5))
        return self.model

    def __exit__(self, *error):
        if self.name is not None:
            vtoken.unwrap(self.model)
        if self.mode is not None:
            self.model.gradient_checkpointing_disable()
        self.model.zero_grad(set_to_none=True)
        self.model.eval()


def gradients(model, inputs):
    """(loss, gradients by name) of one backward pass."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs, labels=labels_of(inputs), use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@functools.lru_cache(maxsize=2)
def without_checkpointing(family, name):
    with Trained(family, name) as model:
        return gradients(model, prompt_of(family, BATCH))


def same(found, wanted):
    assert found[1].keys() == wanted[1].keys()
    torch.testing.assert_close(found[0], wanted[0], atol=1e-6, rtol=1e-6)
    for name, gradient in wanted[1].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6 + 1e-5 * scale, rtol=1e-4, msg=name)


@pytest.mark.parametrize("mode", ["default", "reentrant"])
@pytest.mark.parametrize(("family", "name"), UNCHANGED + pairs())
def test_gradients_under_checkpointing(family, name, mode):
    """Equal for every parameter; reducers with light layers may say that they cannot."""
    wanted = without_checkpointing(family, name)
    assert any(bool(gradient.any()) for part, gradient in wanted[1].items() if "vision" in part or "visual" in part)
    with Trained(family, name, mode) as model:
        found, error = outcome(lambda: gradients(model, prompt_of(family, BATCH)))
    if error is not None:
        assert name in LIGHT, error
        assert isinstance(error, NotImplementedError), error
        assert "checkpoint" in str(error)
        return
    same(found, wanted)


@pytest.mark.parametrize("name", ["uniform", "fastv", "todre", "pyramiddrop", "tome"])
def test_checkpointing_leaves_the_choice_alone(name):
    """A layer that is computed again in the backward pass adds no cut and no statistics."""
    inputs, found = prompt_of("llava", BATCH), []
    for mode in (None, "default"):
        with Trained("llava", name, mode) as model:
            gradients(model, inputs)
            found.append(vtoken.stats(model).layers)
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["uniform", "fastv", "todre"])
@pytest.mark.parametrize("mode", ["default", "reentrant"])
def test_two_forward_passes_before_the_backward_passes(name, mode):
    """As in contrastive or preference training: the second prompt does not become the first one's."""
    prompts, answers = [prompt_of("llava", BATCH), prompt_of("llava", (1, 1), seed=1)], []
    for chosen in (None, mode):
        with Trained("llava", name, chosen) as model:
            losses = [model(**x, labels=labels_of(x), use_cache=False).loss for x in prompts]
            (losses[0] + 2 * losses[1]).backward()
            found = {part: p.grad.clone() for part, p in model.named_parameters() if p.grad is not None}
            answers.append((sum(losses).detach(), found))
    same(answers[1], answers[0])


# ---------------------------------------------------------------- routers
FAMILY = "qwen3_vl_moe"
EXPERTS, CHOSEN = tiny.EXPERTS["num_experts"], tiny.EXPERTS["num_experts_per_tok"]


def recorded(model, inputs):
    """(output, router logits (N, E) that hooks on the gates saw) of a pass."""
    seen = []
    gates = [part for name, part in model.named_modules() if name.endswith("mlp.gate")]
    assert len(gates) == 4
    handles = [gate.register_forward_hook(lambda module, args, out: seen.append(out[0].detach())) for gate in gates]
    try:
        with torch.no_grad():
            out = model(**inputs, labels=labels_of(inputs), output_router_logits=True, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return out, torch.cat(seen)


def balance(logits):
    """The loss of Switch Transformers (2101.03961, equations 4-6) over all tokens of all layers, written out."""
    share, chance = [0.0] * EXPERTS, [0.0] * EXPERTS
    for row in logits.double().softmax(1):
        for expert in row.topk(CHOSEN).indices.tolist():
            share[expert] += 1 / len(logits)
        chance = [old + float(new) / len(logits) for old, new in zip(chance, row, strict=True)]
    return EXPERTS * sum(a * b for a, b in zip(share, chance, strict=True))


@functools.cache
def moe(batch):
    return model_of(FAMILY), prompt_of(FAMILY, batch)


def wrapped_or_not(model, name):
    return torch.no_grad() if name is None else vtoken.reduce(model, built(name, 0.5))


@pytest.mark.parametrize("batch", [(1,), (1, 2), (1, 0, 2)], ids=str)
@pytest.mark.parametrize("name", [None, *(name for _, name in pairs((FAMILY,)))])
def test_router_loss_counts_the_tokens_that_layers_work_on(name, batch):
    """No padding and no dropped token: a padded batch has the loss of its rows' tokens together."""
    model, inputs = moe(batch)
    with wrapped_or_not(model, name):
        out, _ = recorded(model, inputs)
        rows = [recorded(model, alone(inputs, row, batch)) for row in range(len(batch))]
    together = torch.cat([logits for _, logits in rows])
    assert len(out.router_logits) == 4
    assert float(out.aux_loss) == pytest.approx(balance(together), abs=2e-5)
    for single, logits in rows:
        assert float(single.aux_loss) == pytest.approx(balance(logits), abs=2e-5)


@pytest.mark.parametrize("name", [None, "uniform", "fastv", "todre", "tome"])
def test_router_loss_is_part_of_the_loss(name):
    model, inputs = moe((1, 2))
    with wrapped_or_not(model, name), torch.no_grad():
        plain = model(**inputs, labels=labels_of(inputs), use_cache=False)
        out, _ = recorded(model, inputs)
    weight = model.config.text_config.router_aux_loss_coef
    assert torch.equal(out.logits, plain.logits)
    assert float(out.loss) == pytest.approx(float(plain.loss) + weight * float(out.aux_loss), abs=1e-5)


@pytest.mark.parametrize("name", ["uniform", "fastv", "todre", "tome", "pyramiddrop"])
def test_dropping_leaves_tokens_out_of_the_router_loss(name):
    """Fewer rows reach the gates, so that the loss is another than the unpruned one."""
    model, inputs = moe((1,))
    stock, everything = recorded(model, inputs)
    with wrapped_or_not(model, name):
        out, worked = recorded(model, inputs)
    assert len(worked) < len(everything)
    assert float(out.aux_loss) != pytest.approx(float(stock.aux_loss), abs=1e-6)


@pytest.mark.parametrize("batch", [(1,), (1, 2)], ids=str)
@pytest.mark.parametrize("name", ["uniform", "fastv", "todre", "tome"])
def test_router_loss_when_everything_is_kept(name, batch):
    """Bit for bit."""
    model, inputs = moe(batch)
    stock, _ = recorded(model, inputs)
    with vtoken.reduce(model, built(name, 1.0)):
        out, _ = recorded(model, inputs)
    assert torch.equal(out.aux_loss, stock.aux_loss)
    assert torch.equal(out.loss, stock.loss)
    assert all(torch.equal(a, b) for a, b in zip(out.router_logits, stock.router_logits, strict=True))


@pytest.mark.parametrize("name", [None, "uniform", "fastv", "todre", "tome"])
def test_gradients_of_the_router_loss(name):
    """They reach every gate, and checkpointing does not change them (a reentrant one records no router logits)."""
    inputs, answers = prompt_of(FAMILY, BATCH), []
    for chosen in (None, "default"):
        with Trained(FAMILY, name, chosen) as model:
            out = model(**inputs, output_router_logits=True, use_cache=False, labels=labels_of(inputs))
            assert bool(out.aux_loss.isfinite())
            (out.loss + out.aux_loss).backward()
            found = {part: p.grad.clone() for part, p in model.named_parameters() if p.grad is not None}
        gates = [gradient for part, gradient in found.items() if part.endswith("mlp.gate.weight")]
        assert len(gates) == 4
        assert all(bool(gradient.any()) for gradient in gates)
        answers.append((out.loss.detach(), found))
    same(answers[1], answers[0])
