# SPDX-License-Identifier: Apache-2.0
"""Patches dropped inside of the vision tower: equal to hiding them there, and gone for all that comes later."""

from __future__ import annotations

import contextlib
import sys

import foreign
import pytest
import tiny
import torch
from oracles import GREEDY, TOLERANCE, Look, check_rows_and_masking, extended, generate

import vtoken
from vtoken.adapters import adapter_for
from vtoken.encoder import EncoderRead
from vtoken.engine.tower import feature_list

BLOCK = 1
MERGED = {"internvl": 2}  # patches per token and axis
SERVED = ("llava", "vipllava", "llava_next", "llava_onevision", "llava_next_video", "internvl", "paligemma")
PACKED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3")
every_family = pytest.mark.parametrize("family", SERVED)
PRUNE = vtoken.TowerPrune(keep=0.5, block=BLOCK)
PLANS = {
    "alone": PRUNE,
    "then before": vtoken.Chain([PRUNE, vtoken.IDPruner(keep=0.25)]),
    "then inside": vtoken.Chain([PRUNE, vtoken.FastV(keep=0.25, layer=2)]),
}
every_plan = pytest.mark.parametrize("plan", PLANS)


def encoder_call(inputs):
    names = ("pixel_values", "image_sizes")
    return {name: inputs[name] for name in names if name in inputs}


def features(model, inputs):
    with torch.no_grad():
        return torch.cat(feature_list(model.model.get_image_features(**encoder_call(inputs), return_dict=True)))


@contextlib.contextmanager
def eager_tower(model, change=None):
    """Eager attention weights of every block of the tower, after ``change(block number, logits)``."""
    adapter = adapter_for(model)
    numbers = {adapter.vision_attention(i): i for i in range(len(adapter.tower_blocks))}
    source = sys.modules[type(adapter.vision_attention(0)).__module__]
    original, found = source.eager_attention_forward, {}

    def attend(module, query, key, value, mask, *args, **kwargs):
        if module not in numbers:
            return original(module, query, key, value, mask, *args, **kwargs)
        logits = query @ key.mT * kwargs["scaling"]
        weights = (logits if change is None else change(numbers[module], logits)).softmax(-1)
        found.setdefault(numbers[module], []).append(weights)
        return (weights @ value).transpose(1, 2), weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "eager_attention_forward", attend)
        yield found


def chosen(model, inputs, keep, family):
    """(views, patches) bool, from the eager weights of the block before: [CLS] row, or the mean over all patches."""
    with eager_tower(model) as found:
        features(model, inputs)
    weights, first = torch.cat(found[BLOCK - 1]).mean(1), adapter_for(model).leading_tokens
    scores = weights[:, 0, 1:] if first else weights.mean(1)
    size = MERGED.get(family, 1)
    side = round(scores.shape[1] ** 0.5)
    grid = torch.nn.functional.avg_pool2d(scores.view(-1, 1, side, side), size).flatten(1)
    kept = torch.zeros_like(grid).scatter(1, grid.topk(round(keep * grid.shape[1])).indices, 1.0)
    kept = kept.view(-1, 1, side // size, side // size)
    return torch.nn.functional.interpolate(kept, scale_factor=float(size)).flatten(1) > 0


def hide(kept, first):
    """Hides dropped patches as keys, from the cut on."""

    def change(block, logits):
        if block < BLOCK:
            return logits
        gone = torch.cat([torch.zeros(len(kept), first, dtype=torch.bool), ~kept], 1)
        return logits.masked_fill(gone[:, None, None], float("-inf"))

    return change


def kept_tokens(model):
    """(T,) bool over the visual tokens in the order of the features."""
    stats = vtoken.stats(model)
    return torch.cat([row[:n] for row, n in zip(stats.kept[0][1], stats.tokens.tolist(), strict=True)])


@every_family
def test_dropping_equals_hiding_the_patches_in_the_whole_tower(family):
    batch = (1, 2)
    model, inputs = tiny.make(family, batch, attn="eager")
    plain = features(model, inputs)
    kept = chosen(model, inputs, 0.5, family)
    with eager_tower(model, hide(kept, adapter_for(model).leading_tokens)):
        wanted = features(model, inputs)
    model.set_attn_implementation("sdpa")
    with vtoken.reduce(model, PRUNE), torch.no_grad():
        found = features(model, inputs)
        model(**inputs)
        stays = kept_tokens(model)
    newline = (wanted == plain).all(1)  # the same vector whatever the picture
    assert found.shape == wanted.shape == plain.shape
    torch.testing.assert_close(found[stays], wanted[stays], **TOLERANCE)
    assert ((found - wanted).abs().amax(1) > 1e-4)[~stays].all(), "a dropped patch keeps its early state"
    assert stays[newline].all()
    if family in ("llava", "vipllava", "internvl", "paligemma"):
        assert int(stays.sum()) == int(kept.sum()) // MERGED.get(family, 1) ** 2


@every_family
def test_later_blocks_compute_kept_rows_only_and_outward_shapes_stay(family):
    model, inputs = tiny.make(family, (1, 2))
    adapter = adapter_for(model)
    rows, inside, outside = [], [], []
    for block in adapter.tower_blocks:
        block.mlp.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
        block.register_forward_hook(lambda module, args, out: inside.append(out.shape[1]))
    adapter.projector.register_forward_pre_hook(lambda module, args: outside.append(args[0].shape))
    features(model, inputs)
    plain = [x.copy() for x in (inside, outside)]
    for seen in (rows, inside, outside):
        seen.clear()
    with vtoken.reduce(model, PRUNE):
        features(model, inputs)
    first = adapter.leading_tokens
    patches = plain[0][0] - first
    calls = len(rows) // 3
    assert rows == ([patches + first] + [patches // 2 + first] * 2) * calls
    assert outside == plain[1]
    assert inside == plain[0], "as recorded hidden states"


@every_plan
@every_family
def test_ragged_batch_equals_alone_and_masking(family, plan):
    batch = (1, 2, 0)
    model, inputs = tiny.make(family, batch)
    check_rows_and_masking(model, inputs, PLANS[plan], batch, 4)


@every_plan
@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "internvl"])
def test_generate_equals_no_cache(family, plan):
    model, inputs = tiny.make(family, (1, 2))
    length = inputs["input_ids"].shape[1]
    if plan == "then inside":  # reads the last text row, which moves as the answer grows
        plan = "then before"
    with vtoken.reduce(model, PLANS[plan]), torch.no_grad():
        out = generate(model, inputs, 4, output_logits=True, return_dict_in_generate=True)
        for step in range(4):
            longer = extended(model, inputs, out.sequences[:, length : length + step])
            wanted = model(**longer, use_cache=False).logits[:, -1]
            torch.testing.assert_close(out.logits[step], wanted, **TOLERANCE)


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
def test_shortened_inputs_equal_the_wrapped_model(family):
    if not tiny.ENCODED_INPUT:
        pytest.skip("needs transformers >= 5.18")
    model, inputs = tiny.make(family, (1, 2))
    with vtoken.reduce(model, PLANS["then before"]):
        wanted = generate(model, inputs, 4)[:, -4:]
    short = vtoken.shorten(model, inputs, PLANS["then before"])
    assert torch.equal(model.generate(**short, max_new_tokens=4, **GREEDY)[:, -4:], wanted)


def test_a_chain_counts_original_tokens_and_chooses_from_what_the_tower_kept():
    model, inputs = tiny.make("llava_next", (1, 2))
    with vtoken.reduce(model, PRUNE), torch.no_grad():
        model(**inputs)
        survivors = vtoken.stats(model).kept[0][1]
    with vtoken.reduce(model, PLANS["then before"]), torch.no_grad():
        model(**inputs)
        stats = vtoken.stats(model)
    assert [image.kept for image in stats.images] == [round(image.tokens * 0.25) for image in stats.images]
    assert not (stats.kept[0][1] & ~survivors).any()
    assert [image.tokens for image in stats.images] == [52, 56, 56], "as without a cut inside the tower"
    assert torch.equal(stats.from_tower, survivors.sum(1))


@pytest.mark.parametrize("what", ["received", "keys"])
@pytest.mark.parametrize("family", ["llava", "llava_onevision", "internvl"])
def test_statistics_of_later_blocks_are_of_kept_patches(family, what):
    if family == "llava_onevision":
        model, inputs = tiny.make(family, (1,), attn="eager", sizes=[(24, 24)])
    else:
        model, inputs = tiny.make(family, (2,), attn="eager")
    kept, first = chosen(model, inputs, 0.5, family), adapter_for(model).leading_tokens
    with eager_tower(model, hide(kept, first)) as found:
        features(model, inputs)
    look = Look((EncoderRead(what, -1), EncoderRead("received", 0)))
    model.set_attn_implementation("sdpa")
    with vtoken.reduce(model, vtoken.Chain([PRUNE, look])), torch.no_grad():
        model(**inputs)
    ctx = look.seen["ctx"]
    for read, values in ctx.encoder.items():
        values = values if values.dim() == 2 else values[..., 0]
        assert torch.equal(values.isfinite(), ctx.candidates), "only candidates have a value"
        if read.layer == 0 or what == "keys":
            continue
        weights = torch.cat(found[2]).mean(1)[:, first:, first:]
        wanted = [weights[view][kept[view]].mean(0)[kept[view]] for view in range(len(weights))]
        if family == "internvl":
            assert torch.allclose(values[ctx.candidates].sum() * 4, torch.cat(wanted).sum())
        elif family == "llava":
            torch.testing.assert_close(values[ctx.candidates], torch.cat(wanted), atol=1e-6, rtol=1e-4)


def test_interpolated_tokens_stay_where_most_of_them_was_kept():
    """OneVision shrinks a large mosaic between the tower and the decoder: a token comes from several patches."""
    model, inputs = tiny.make("llava_onevision", (1,), ratio="anyres_max_1", sizes=[(48, 48)])
    chain = vtoken.Chain([vtoken.TowerPrune(keep=0.75, block=BLOCK), vtoken.IDPruner(keep=0.25, layer=-1)])
    with vtoken.reduce(model, chain), torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
        (image,) = vtoken.stats(model).images
    assert image.kept == round(image.tokens * 0.25)


@pytest.mark.parametrize("reducer", [vtoken.TowerPrune(keep=1.0), vtoken.Chain([vtoken.TowerPrune(keep=1.0)])], ids=str)
def test_keep_all_does_nothing(reducer):
    model, inputs = tiny.make("llava", (1, 2))
    plain = model(**inputs).logits
    with vtoken.reduce(model, reducer):
        assert torch.equal(model(**inputs).logits, plain)


def test_nothing_stays_behind_on_the_tower():
    model, inputs = tiny.make("llava", (1,))
    features(model, inputs)
    tower = adapter_for(model).tower

    def trace():
        return [(sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in tower.modules()]

    before, plain = trace(), features(model, inputs)
    with vtoken.reduce(model, PRUNE):
        assert not torch.equal(features(model, inputs), plain)
        assert trace() == before, "hooks live as long as a call"
    assert torch.equal(features(model, inputs), plain)


def test_an_int_is_patches_of_each_view():
    model, inputs = tiny.make("llava_next", (1,), sizes=[(48, 48)])
    with vtoken.reduce(model, vtoken.TowerPrune(keep=3, block=BLOCK)), torch.no_grad():
        model(**inputs)
        (image,) = vtoken.stats(model).images
    assert image.kept == 5 * 3 + 8, "five views, and the newlines of eight rows"


def test_clips_of_pooled_frames():
    model, inputs = tiny.make("llava_next_video", (1,), video=True)
    with vtoken.reduce(model, PRUNE), torch.no_grad():
        model(**inputs)
        (clip,) = vtoken.stats(model).images
    assert (clip.tokens, clip.kept) == (tiny.FRAMES * 4, tiny.FRAMES * 2)


def test_gradients_reach_the_patch_embedding():
    model, inputs = tiny.make("llava", (1,))
    with vtoken.reduce(model, PRUNE):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradient = next(p.grad for n, p in model.named_parameters() if "patch_embedding" in n)
    assert gradient.isfinite().all()
    assert gradient.any()


@pytest.mark.parametrize("make", [foreign.llava, foreign.internvl_chat])
@every_plan
def test_models_outside_of_transformers(make, plan):
    model, inputs = make()
    new = {**GREEDY, "max_new_tokens": 4}
    plain = model.generate(**inputs, **new)
    with vtoken.reduce(model, PLANS[plan]):
        out = model.generate(**inputs, **new)
        stats = vtoken.stats(model)
    with vtoken.reduce(model, PLANS[plan], backend="mask"):
        assert torch.equal(model.generate(**inputs, **new), out)
    patches = (stats.tokens - (stats.tokens % 16)) // 2  # whole grids, and newlines on top
    assert (stats.from_tower == patches + stats.tokens % 16).all() or make is foreign.internvl_chat
    assert stats.tokens_kept < stats.tokens_in
    assert torch.equal(model.generate(**inputs, **new), plain)


# ---------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize("family", PACKED)
def test_packed_towers_are_refused(family):
    model, inputs = tiny.make(family, (1,))
    with vtoken.reduce(model, PRUNE), pytest.raises(ValueError, match="use a reducer that"):
        model(**inputs)


def test_clips_that_are_interpolated_are_refused():
    model, inputs = tiny.make("llava_onevision", (1,), video=True)
    with vtoken.reduce(model, PRUNE), pytest.raises(ValueError, match="interpolates the frames"):
        model(**inputs)


@pytest.mark.parametrize("block", [0, -3])
def test_the_first_block_has_no_attention_before_it(block):
    model, inputs = tiny.make("llava", (1,))
    with (
        vtoken.reduce(model, vtoken.TowerPrune(block=block)),
        pytest.raises(ValueError, match=r"is its first: .* name one of 1 to 2"),
    ):
        model(**inputs)


def test_cls_attention_needs_a_cls_token():
    model, inputs = tiny.make("llava", (1,), tower="siglip")
    with (
        vtoken.reduce(model, vtoken.TowerPrune(block=BLOCK, by="cls")),
        pytest.raises(ValueError, match=r"no \[CLS\] token"),
    ):
        model(**inputs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"by": "given"}, "by='given': choose one of"), ({"block": 1.5}, "block=1.5"), ({"keep": 0.0}, "keep=0.0")],
)
def test_parameters_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        vtoken.TowerPrune(**fields)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([vtoken.IDPruner(keep=0.5), PRUNE], "only the first stage"),
        ([PRUNE, PRUNE], "only the first stage"),
        ([vtoken.VTW(layer=2), PRUNE], "only the first stage"),
        ([PRUNE, vtoken.IDPruner(keep=0.5)], "does nothing after"),
    ],
)
def test_orders_of_a_chain(stages, message):
    with pytest.raises(ValueError, match=message):
        vtoken.Chain(stages)


def test_a_number_of_patches_says_nothing_about_the_tokens_of_an_image():
    chain = vtoken.Chain([vtoken.TowerPrune(keep=64), vtoken.IDPruner(keep=160)])
    assert chain.stages == ("in_tower", "before_llm")
