# SPDX-License-Identifier: Apache-2.0
"""ZOO-Prune's sensitivities on the projectors of real model classes, against the stock module perturbed directly."""

from __future__ import annotations

import pytest
import tiny
import torch

import vtoken

PROJECTOR = {
    "llava": lambda model: model.model.multi_modal_projector,
    "internvl": lambda model: model.model.multi_modal_projector,
    "qwen2_vl": lambda model: model.model.visual.merger,
    "qwen2_5_vl": lambda model: model.model.visual.merger,
    "qwen3_vl": lambda model: model.model.visual.merger,
}
MERGING = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
STEP, DIRECTIONS = 0.05, 12


def projector_call(model, inputs):
    """What the stock projector was given and what it returned, in a run of the unwrapped model."""
    seen = []
    hook = PROJECTOR[model.config.model_type](model).register_forward_hook(lambda m, a, out: seen.append((a[0], out)))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen[0]


def by_hand(projector, given, group):
    """One token's patches move together: (T,) in the order of the projector's own rows."""
    size = group * given.shape[-1]
    directions = torch.randn(DIRECTIONS, size, generator=torch.Generator().manual_seed(0))
    total = 0
    for direction in directions:
        shift = (STEP * direction / direction.norm()).view(group, -1).repeat(given.shape[-2] // group, 1)
        with torch.no_grad():
            moved = projector(given + shift) - projector(given - shift)
        total = total + moved.flatten(0, -2).norm(dim=1)
    return total / (2 * STEP * DIRECTIONS)


@pytest.mark.parametrize("family", PROJECTOR)
def test_sensitivities_are_those_of_the_stock_projector(family):
    model, inputs = tiny.make(family, (1, 1))
    given, returned = projector_call(model, inputs)
    group = given.flatten(0, -2).shape[0] // returned.flatten(0, -2).shape[0]
    assert (group > 1) == (family in MERGING)
    wanted = by_hand(PROJECTOR[family](model), given, group)
    reducer = vtoken.ZOOPrune(keep=0.5, step=STEP, directions=DIRECTIONS)
    found = {}
    original = reducer._sensitivity

    def spy(ctx):
        found["sensitivity"], found["features"] = original(ctx)[ctx.candidates], ctx.features[ctx.candidates]
        return original(ctx)

    object.__setattr__(reducer, "_sensitivity", spy)
    with vtoken.reduce(model, reducer), torch.no_grad():
        model(**inputs)
    rows = torch.cdist(found["features"], returned.flatten(0, -2)).argmin(1)  # Qwen2.5-VL's tower works in windows
    torch.testing.assert_close(found["features"], returned.flatten(0, -2)[rows], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["sensitivity"], wanted[rows], atol=1e-4, rtol=1e-3)
    assert found["sensitivity"].std() > 0


@pytest.mark.parametrize("family", ["gemma3", "aya_vision", "cohere2_vision", "idefics3", "mistral3"])
def test_a_projector_without_one_input_per_token_is_refused(family):
    model, inputs = tiny.make(family, (1,))
    with vtoken.reduce(model, vtoken.ZOOPrune(keep=0.5)), pytest.raises(ValueError, match="no input of its own"):
        model(**inputs)


@pytest.mark.parametrize("name", ["mmtok", "prunesid"])
@pytest.mark.parametrize("family", ["gemma3", "mistral3"])
def test_features_behind_such_a_projector_are_an_option(family, name):
    model, inputs = tiny.make(family, (1,))
    with vtoken.reduce(model, name, keep=0.5), pytest.raises(ValueError, match="some take visual='projected'"):
        model(**inputs)
    with vtoken.reduce(model, name, keep=0.5, visual="projected"), torch.no_grad():
        model(**inputs)
        (image,) = vtoken.stats(model).images
    assert image.kept == round(image.tokens * 0.5)
