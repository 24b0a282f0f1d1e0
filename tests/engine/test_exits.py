# SPDX-License-Identifier: Apache-2.0
"""What DyVTE's training-free exits measure inside of real model classes, against stock runs with eager attention."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch
from oracles import TOLERANCE, language_model, visual_and_real

import vtoken
from vtoken.reducers import dyvte

FAMILIES = ["llava", "qwen2_5_vl", "internvl"]
BATCHES = {"alone": (1,), "ragged": (1, 2)}
LAYER = 2


def measured(monkeypatch, model, inputs, exit, name):
    """What the criterion was at each layer, in the order of the layers."""
    seen = []
    original = getattr(dyvte, name)
    monkeypatch.setattr(dyvte, name, lambda *args: seen.append(original(*args)) or seen[-1])
    with vtoken.reduce(model, vtoken.DyVTE(exit=exit, threshold=0.0, min_layer=1)), torch.no_grad():
        model(**inputs)
    return seen


def last_text(inputs, row):
    return int(inputs["attention_mask"][row].nonzero().max())


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_contribution_is_that_of_the_attention_output(monkeypatch, family, batch):
    """From eager weights and the value projection."""
    model, inputs = tiny.make(family, BATCHES[batch])
    seen = measured(monkeypatch, model, inputs, "contribution", "contribution")
    model.set_attn_implementation("eager")
    block = language_model(model).layers[LAYER].self_attn
    values = []
    hook = block.v_proj.register_forward_hook(lambda m, a, out: values.append(out))
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions[LAYER]
    hook.remove()
    visual, _ = visual_and_real(inputs)
    groups = weights.shape[1] // (values[0].shape[-1] // block.head_dim)
    v = values[0].unflatten(2, (-1, block.head_dim)).transpose(1, 2).repeat_interleave(groups, 1)
    for row in range(len(visual)):
        a = weights[row, :, last_text(inputs, row)]
        part = (a[:, visual[row], None] * v[row][:, visual[row]]).sum(1).norm()
        torch.testing.assert_close(seen[LAYER][row], part / (a[..., None] * v[row]).sum(1).norm(), **TOLERANCE)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_convergence_is_that_of_a_layer_that_cannot_see_the_picture(monkeypatch, family, batch):
    """The layer is run in full length with the visual columns masked."""
    model, inputs = tiny.make(family, BATCHES[batch], attn="eager")
    seen = measured(monkeypatch, model, inputs, "convergence", "divergence")
    visual, real = visual_and_real(inputs)
    layer, outputs = language_model(model).layers[LAYER], {}

    def hide(module, args, kwargs):
        length = visual.shape[1]
        sees = torch.ones(length, length, dtype=torch.bool).tril() & (real & ~visual)[:, None]
        sees |= torch.eye(length, dtype=torch.bool)
        mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[:, None]
        return args, {**kwargs, "attention_mask": mask}

    for name in ("with", "without"):
        hooks = [layer.register_forward_hook(lambda m, a, out, name=name: outputs.update({name: out}))]
        if name == "without":
            hooks.append(layer.register_forward_pre_hook(hide, with_kwargs=True))
        with torch.no_grad():
            model(**inputs, use_cache=False)
        for hook in hooks:
            hook.remove()
    for row in range(len(visual)):
        start, end = int(visual[row].nonzero().max()) + 1, last_text(inputs, row)
        f = [torch.cat([out[row, start:end].mean(0), out[row, end]]) for out in outputs.values()]
        wanted = 1 - torch.nn.functional.cosine_similarity(*f, dim=0)
        torch.testing.assert_close(seen[LAYER][row], wanted, **TOLERANCE)
        assert wanted > 1e-4


@pytest.mark.parametrize("exit", ["contribution", "convergence"])
@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_vl", "llava_onevision"])
def test_rows_leave_on_their_own_and_nothing_else_changes(family, exit):
    """A threshold of 1 leaves at once, as VTW does; one of 0 never; a batch gives what each row gives alone."""
    model, inputs = tiny.make(family, (1, 2, 0))
    with torch.no_grad():
        plain = model(**inputs).logits
        found = {}
        for threshold in (0.0, 1.0):
            with vtoken.reduce(model, vtoken.DyVTE(exit=exit, threshold=threshold, min_layer=LAYER)):
                found[threshold] = model(**inputs).logits
        with vtoken.reduce(model, vtoken.VTW(layer=LAYER)):
            fixed = model(**inputs).logits
    torch.testing.assert_close(found[0.0], plain, **TOLERANCE)
    torch.testing.assert_close(found[1.0], fixed, **TOLERANCE)
    assert not torch.allclose(fixed[0], plain[0], atol=1e-3)


def test_a_tapped_layer_is_not_disturbed_by_the_second_run():
    """FastV reads the layer that the convergence exit runs once more, here with a cache."""
    model, inputs = tiny.make("llava", (1, 2))
    fastv = vtoken.FastV(keep=0.5, layer=3)
    exit = vtoken.DyVTE(exit="convergence", threshold=0.0, min_layer=1)
    with torch.no_grad():
        with vtoken.reduce(model, fastv):
            wanted = model(**inputs).logits
        with vtoken.reduce(model, vtoken.Chain([exit, fastv])):
            torch.testing.assert_close(model(**inputs).logits, wanted, **TOLERANCE)


def test_the_configuration_holds_the_criterion():
    reducer = vtoken.get_reducer("dyvte-convergence")
    assert vtoken.get_reducer(reducer.config()) == reducer
    assert reducer == dataclasses.replace(vtoken.DyVTE(), exit="convergence", threshold=0.001, patience=2)
