# SPDX-License-Identifier: Apache-2.0
"""Which patch becomes which token, as it is measured: against every map that is written by hand, and on the zoo.

Oracles: the adapters' own `pack`, one patch changed at a time behind the last block that is used, and eager attention.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from dataclasses import dataclass

import pytest
import tiny
import torch
import zoo
from oracles import TOLERANCE, Look, built, eager_weights
from transformers import CONFIG_MAPPING

import vtoken
from vtoken.adapters import adapter_for
from vtoken.adapters.base import single_view
from vtoken.adapters.generic import find_outer
from vtoken.adapters.marking import UNUSED, Marker, PatchMap, code_words, read_words
from vtoken.encoder import EncoderRead
from vtoken.engine.encode import encode
from vtoken.engine.tower import VisionReader, feature_list

MIXED = "mixes patches behind the blocks"
UNREADABLE = "has no attention that can be read"
UNREAD = ("got_ocr2", "pp_chart2table", "emu3", "fuyu", "gemma4_unified", "inkling_mm_model", *zoo.TIMM)
REFUSED = {
    "aria": MIXED,
    "idefics2": MIXED,
    "step3p7": MIXED,
    "granite4_vision": "of several blocks of the vision tower",
    "deepseek_ocr2": "masks its attention by more than the borders",
    **dict.fromkeys(
        UNREAD,
        UNREADABLE,
    ),
}
"""Types without statistics of their encoder, and why."""
INSTALLED = [family for family in zoo.BUILDERS if family in CONFIG_MAPPING and family not in zoo.PICTURED]
SERVED = [family for family in INSTALLED if family not in REFUSED]
every_family = pytest.mark.parametrize("family", SERVED)
BATCH = (1, 2, 0)
LEADING = {"qianfan_ocr": 1, "video_llava": 1, "inkling2": 1, "nemotron_h_omni": 2}
"""Tokens before the patches, from the papers."""
TRAILING = {"llama4": 1}
"""Tokens behind the patches."""
WINDOWED = {"qwen2_5_omni_thinker": 1, "hyperclovax_vision_v2": 1, "exaone4_5": 1}
"""The block of the tiny model that attends to the whole picture, where the last one does not."""
READERS = ("visionzip", "prumerge", "fopru")


# --------------------------------------------------------------------------------------- against maps written by hand
BY_HAND = [(family, {}) for family in tiny.BUILDERS]
CLIPS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_next_video", "llava_onevision")
BY_HAND += [(family, {"video": True}) for family in CLIPS]
BY_HAND += [("llava", {"tower": t, "strategy": s}) for t in tiny.TOWERS for s in ("default", "full")]
BY_HAND.remove(("llava", {"tower": "pixtral", "strategy": "default"}))  # the model itself fails


def packed(family, **changes):
    """A model's adapter, and what its `pack` is given in one call: parts, modality, the arguments."""
    model, inputs = tiny.make(family, (1, 2), **changes)
    adapter, seen = adapter_for(model), []
    original = adapter.pack

    def pack(*args):
        seen.append(args)
        return original(*args)

    adapter.pack = pack
    encode(adapter, VisionReader(adapter, [EncoderRead("given", -1)], False), inputs)
    adapter.pack = original
    return adapter, *seen[0]


@pytest.mark.parametrize(("family", "changes"), BY_HAND, ids=str)
def test_the_measured_map_is_the_one_written_by_hand(family, changes):
    adapter, parts, modality, call = packed(family, **changes)
    skip, generator = adapter.skipped_tokens(call), torch.Generator().manual_seed(0)
    rows = [torch.randn(len(part), part.shape[1] + skip, 3, generator=generator) for part in parts]
    flat = torch.cat([part.flatten(0, 1) for part in rows])
    found = Marker(adapter).map_of(modality, call, len(flat))
    wanted = adapter.pack([part[:, skip:] for part in rows], modality, call)
    torch.testing.assert_close(found.mean(flat), wanted, equal_nan=True)
    assert wanted.isfinite().any()


def test_interpolated_patches_are_refused():
    adapter, parts, modality, call = packed("llava_onevision", ratio="anyres_max_1")
    with pytest.raises(ValueError, match=MIXED):
        Marker(adapter).map_of(modality, call, sum(part.shape[:2].numel() for part in parts))


# ------------------------------------------------------------------------------------------------------- on the zoo
def features(model, given, modality="image"):
    """(T, D) features of all items."""
    method = getattr(find_outer(model), f"get_{modality}_features")
    names = inspect.signature(method).parameters
    with torch.no_grad():
        return torch.cat(feature_list(method(**{k: v for k, v in given.items() if k in names}, return_dict=True)))


def blocks_of(model):
    return adapter_for(model).tower_blocks


@contextlib.contextmanager
def changed(block, row):
    """Another row ``row`` of the output of a block, counted over its calls; None for all rows. Gives their number."""
    seen = [0]

    def hook(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        flat = hidden.clone(memory_format=torch.contiguous_format).flatten(0, -2)
        first = seen[0]
        seen[0] += len(flat)
        if row is None:
            flat += 3 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(7))
        elif first <= row < seen[0]:
            flat[row - first] += 3 * torch.randn(flat.shape[-1], generator=torch.Generator().manual_seed(7))
        flat = flat.view_as(hidden)
        return (flat, *output[1:]) if isinstance(output, tuple) else flat

    handle = block.register_forward_hook(hook, prepend=True)
    try:
        yield seen
    finally:
        handle.remove()


def last_used(model, given, modality="image"):
    """The last block whose output reaches the features, and its rows."""
    before = features(model, given, modality)
    for block in reversed(blocks_of(model)):
        with changed(block, None) as rows:
            after = features(model, given, modality)
        if not torch.equal(before, after):
            return block, rows[0]
    raise AssertionError("no block reaches the features")


def moved(model, given, block, row, modality="image"):
    """(T,) bool: tokens that change with one row of the output of a block."""
    before = features(model, given, modality)
    with changed(block, row):
        difference = (features(model, given, modality) - before).abs().amax(1)
    return difference > max(1e-3 * float(difference.max()), 1e-6 * float(before.abs().max()))


@functools.cache
def members(family):
    """(T, N) bool: which rows of the tower are part of which token of the last picture, found one by one."""
    case = zoo.make(family, BATCH)
    block, rows = last_used(case.model, case.pictures[-1])
    return torch.stack([moved(case.model, case.pictures[-1], block, row) for row in range(rows)], 1)


def eager(family):
    """Eager attention (H, N, N) of the last picture in the block that is read."""
    case = zoo.make(family, BATCH, attn="eager")
    attention = adapter_for(case.model).vision_attention(WINDOWED.get(family, -1))
    (weights,) = eager_weights(attention, lambda: features(case.model, case.pictures[-1]))
    return weights[0]


@every_family
def test_encoder_statistics_equal_eager(family):
    """Each token has the mean over its patches, of what the eager tower attends to, under every backend."""
    case, rows, first = zoo.make(family, BATCH), members(family).float(), LEADING.get(family, 0)
    weights = eager(family).mean(0)
    wanted = {EncoderRead("received", -1): weights[first:].mean(0)}
    if first:
        wanted[EncoderRead("cls", -1)] = weights[0]
    look = Look(tuple(wanted))
    with vtoken.reduce(case.model, look, **zoo.positions(family)), torch.no_grad():
        case.model(**case.inputs)
    found = look.seen["ctx"].encoder
    for read, values in wanted.items():
        mean = (rows @ values) / rows.sum(1)
        torch.testing.assert_close(found[read][-1, : len(mean)], mean, atol=1e-6, rtol=1e-4, equal_nan=True)
        assert float(mean.nan_to_num().std()) > 1e-5  # or any map would do
    place, last = torch.arange(rows.shape[1]), rows.shape[1] - TRAILING.get(family, 0)
    assert torch.equal(rows.sum(0) == 0, (place < first) | (place >= last))  # [CLS] and registers alone are unused


@pytest.mark.parametrize("family", [family for family in SERVED if family in zoo.CLIPS])
def test_patches_of_clips(family):
    """Two clips of three steps: a patch changes the token that the map names."""
    case = zoo.clips(family)
    given = {name: value for name, value in case.inputs.items() if "video" in name or "merge_sizes" in name}
    block, rows = last_used(case.model, given, "video")
    found = Marker(adapter_for(case.model)).map_of("video", given, rows)
    assert len(found.members) == 2 * zoo.CLIP_TOKENS
    for row in range(0, rows, 11):
        assert moved(case.model, given, block, row, "video").nonzero()[:, 0].tolist() == [int(found.token[row])]


@pytest.mark.parametrize("family", [family for family in REFUSED if family in CONFIG_MAPPING])
def test_a_tower_without_a_map_is_refused(family, record_property):
    case = zoo.make(family, (1,))
    with (
        vtoken.reduce(case.model, "visionzip", keep=0.5, **zoo.positions(family)),
        pytest.raises(ValueError, match=REFUSED[family]) as caught,
        torch.no_grad(),
    ):
        case.model(**case.inputs)
    assert str(caught.value).count(". ") == 0
    record_property("refused", "encoder attention")


@pytest.mark.parametrize("name", READERS)
@every_family
def test_reducers_that_read_the_encoder(family, name):
    """Budgets are exact, and a batch is its rows alone."""
    case, reducer = zoo.make(family, zoo.batch(family, *BATCH)), built(name, 0.5)
    with vtoken.reduce(case.model, reducer, **zoo.positions(family)), torch.no_grad():
        together = case.model(**case.inputs).logits
        assert together.isfinite().all()
        for number, image in enumerate(vtoken.stats(case.model).images):
            on_top = family == "hunyuan_vl" and reducer.newlines == "keep"  # a separator for each row, and two more
            extra = zoo.GRIDS[number][1] // 2 + 2 if on_top else 0
            assert image.kept == round((image.tokens - extra) / 2) + extra
        if family in (*zoo.UNEQUAL, *zoo.UNPADDED):
            return
        logits = case.model(**case.alone(1)).logits
    torch.testing.assert_close(together[1:2, -logits.shape[1] :], logits, **TOLERANCE)


def test_a_picture_with_separators():
    """HunYuan puts a token before a picture, one after each row of tokens, and one behind it: they show nothing."""
    case = zoo.make("hunyuan_vl", BATCH)
    found = vtoken.token_map(case.model, case.inputs, [(32, 48), (32, 32), (48, 16)])
    for image, (_, height, width) in enumerate(zoo.GRIDS[:3]):
        rows, columns = height // 2, width // 2
        wanted = [-1, *([*[0] * columns, -1] * rows), -1]
        assert found.view[found.image == image].tolist() == wanted
    assert torch.equal(members("hunyuan_vl").any(1), found.view[found.image == 2] == 0)
    assert found.box[-3].tolist() == [8.0, 40.0, 16.0, 48.0]


# --------------------------------------------------------------------------------------------------- how it is measured
def given_to(family="deepseek_vl"):
    case = zoo.make(family, (1,))
    return adapter_for(case.model), case.pictures[0]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 100, 4000])
def test_code_words(count):
    """No two are alike, all have as many bits, and two of them together are no third."""
    words = code_words(count)
    assert len(words.unique(dim=0)) == count
    assert words.shape[1] <= 15
    assert words.sum(1).unique().tolist() == [(words.shape[1] + 1) // 2]
    assert torch.equal(read_words(words, words), torch.arange(count))
    if count > 1:
        both = words[:1] | words[1:]
        assert all(read_words(row[None], words) is None for row in both[:50])
    nothing = torch.zeros(2, words.shape[1], dtype=torch.bool)
    assert read_words(nothing, words).tolist() == [UNUSED, UNUSED]


def test_the_mean_of_patches():
    found = PatchMap.of(torch.tensor([2, UNUSED, 0, 2]), 3)
    assert found.members.tolist() == [[2, UNUSED], [UNUSED, UNUSED], [0, 3]]
    values = torch.tensor([[1.0], [float("nan")], [4.0], [3.0]])
    torch.testing.assert_close(found.mean(values), torch.tensor([[4.0], [float("nan")], [2.0]]), equal_nan=True)


def test_blocks_are_left_out_and_maps_are_kept():
    """One block runs once for each new shape, and nothing at all for one that was seen."""
    adapter, given = given_to()
    runs, (rows, marker) = [], (16, Marker(adapter, size=2))
    attention = [block.self_attn.register_forward_hook(lambda *_: runs.append(1)) for block in adapter.tower_blocks]
    calls = adapter.tower.register_forward_hook(lambda *_: runs.append(2))
    first = marker.map_of("image", given, rows)
    assert sorted(runs) == [1, 2, 2]
    assert marker.map_of("image", {"pixel_values": given["pixel_values"] + 1}, rows) is first
    assert sorted(runs) == [1, 2, 2]
    for count in (2, 3):
        marker.map_of("image", {"pixel_values": given["pixel_values"].repeat(count, 1, 1, 1)}, count * rows)
    assert len(marker.maps) == 2
    assert marker.map_of("image", given, rows) is not first
    for handle in (*attention, calls):
        handle.remove()


def test_a_map_is_that_of_the_grid_of_the_call():
    """Two grids of as many patches have maps of their own."""
    adapter, _ = given_to("qwen2_5_omni_thinker")
    rows = torch.randn(96, 96, generator=torch.Generator().manual_seed(0))
    wide, high = (
        adapter.marker.map_of("image", {"pixel_values": rows, "image_grid_thw": torch.tensor([grid])}, 96)
        for grid in ([1, 8, 12], [1, 12, 8])
    )
    assert not torch.equal(wide.token, high.token)


def test_nothing_is_left_behind():
    """Blocks get their forward back, their own one too, and their mode; also after an error."""
    adapter, given = given_to()
    blocks = list(adapter.tower_blocks)
    own = blocks[1].forward = functools.partial(type(blocks[1]).forward, blocks[1])  # as offload hooks do
    adapter.tower.train()
    try:
        Marker(adapter).map_of("image", given, 16)
        with pytest.raises(ValueError, match="works on 17 rows, which are not those of its blocks"):
            Marker(adapter).map_of("image", given, 17)
        assert all(block.training for block in blocks)
        assert vars(blocks[1])["forward"] is own
        assert "forward" not in vars(blocks[0])
        assert all(parameter.grad is None for parameter in adapter.model.parameters())
    finally:
        adapter.tower.eval()
        del blocks[1].forward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_inference_mode(dtype):
    adapter, given = given_to("minicpmv4_6")
    wanted = Marker(adapter).map_of("image", given, 24)
    adapter.model.to(dtype)
    try:
        with torch.inference_mode():
            inside = {name: value.clone() for name, value in given.items()}
            inside["pixel_values"] = inside["pixel_values"].to(dtype)
            found = Marker(adapter).map_of("image", inside, 24)
    finally:
        adapter.model.to(torch.float32)
    assert torch.equal(found.token, wanted.token)


def test_a_model_that_is_trained_with_checkpointing():
    case = zoo.make("deepseek_vl", (1,))
    case.model.train()
    case.model.gradient_checkpointing_enable()
    try:
        with vtoken.reduce(case.model, "visionzip", keep=0.5):
            case.model(**case.inputs).logits.sum().backward()
            assert [image.kept for image in vtoken.stats(case.model).images] == [8]
    finally:
        case.model.gradient_checkpointing_disable()
        case.model.eval()
        case.model.zero_grad()


def test_features_without_a_derivative_are_refused():
    adapter, given = given_to()
    encode = adapter.outer.get_image_features
    adapter.outer.get_image_features = torch.no_grad()(encode)
    try:
        with pytest.raises(ValueError, match="No derivative of the visual tokens of DeepseekVLForConditionalGen"):
            Marker(adapter).map_of("image", given, 16)
    finally:
        del adapter.outer.get_image_features


def test_tokens_of_no_patch_in_an_unknown_place_are_refused(monkeypatch):
    adapter, given = given_to("hunyuan_vl")
    monkeypatch.setattr(adapter, "layouts", lambda modality, call, lengths: [single_view(1, n) for n in lengths])
    with pytest.raises(ValueError, match="visual tokens that no patch becomes a part of"):
        Marker(adapter).map_of("image", given, 96)


def test_a_block_that_does_not_attend_is_not_read():
    """LFM3's tower has convolutional blocks: they are passed over, or refused by their number."""
    case = zoo.make("lfm3_vl", (1,))
    adapter = adapter_for(case.model)
    assert adapter.global_blocks == (1, 2)
    assert adapter.read_block(-3) == 1
    with pytest.raises(ValueError, match=r"Block 0 of the vision tower of .* does not attend"):
        adapter.read_block(0)


@pytest.mark.parametrize(
    ("kind", "name", "sentence"),
    [
        ("deepseek_vl", "zooprune", "projector of DeepseekVLForConditionalGeneration has no usual name"),
        ("shieldgemma2", "zooprune", "a token has no input of its own"),
        ("deepseek_vl", "downsample", "does not tell how its pictures are made smaller"),
        ("deepseek_vl", "tower-prune", "does not tell what patches of the vision tower can be left out together"),
    ],
)
def test_what_is_not_found_by_convention_is_said(kind, name, sentence):
    case = zoo.make(kind, (1,))
    with vtoken.reduce(case.model, built(name, 0.5)), pytest.raises(ValueError, match=sentence), torch.no_grad():
        case.model(**case.inputs)


@dataclass(frozen=True)
class BeforeProjector(Look):
    """Looks at what the projector is given, too."""

    needs_projector = True


ONE_TO_ONE = ("glm4v", "glm4v_moe", "glm_ocr", "qianfan_ocr", "video_llava", "nemotron_h_omni")


@pytest.mark.parametrize("kind", [kind for kind in ONE_TO_ONE if kind in INSTALLED])
def test_the_input_of_a_projector_that_has_one_row_for_a_token(kind):
    """The projector makes the token of it."""
    case, look = zoo.make(kind, BATCH), BeforeProjector()
    with vtoken.reduce(case.model, look), torch.no_grad():
        case.model(**case.inputs)
    ctx = look.seen["ctx"]
    with torch.no_grad():
        made = ctx.projector(ctx.projector_input[ctx.valid])
    torch.testing.assert_close(made, ctx.features[ctx.valid], atol=1e-5, rtol=1e-4)


def test_a_token_behind_the_patches_is_not_taken_for_one_before_them():
    case = zoo.make("llama4", (1,))
    with vtoken.reduce(case.model, "visionzip", keep=0.5) as model:
        vtoken.wrapping.session_of(model).adapter.leading_tokens = 1  # what its parameters say
        with pytest.raises(ValueError, match="1 tokens that are no patches, but not before"):
            case.model(**case.inputs)
