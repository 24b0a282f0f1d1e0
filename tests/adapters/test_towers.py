# SPDX-License-Identifier: Apache-2.0
"""Any tower behind LLaVA: which token is which patch, what its statistics are, and which blocks they are read from.

Oracles: painting one patch of the pixels, eager attention weights of the tower, and keys planted in its blocks.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass

import flash
import pytest
import tiny
import torch
from oracles import Look, alone, built, eager_encoder, generate
from torch import nn

import vtoken
from vtoken.adapters import adapter_for, towers
from vtoken.encoder import EncoderRead, separated
from vtoken.reducers.base import KeepReducer

CASES = [(tower, strategy) for tower in tiny.TOWERS for strategy in ("default", "full")]
CASES.remove(("pixtral", "default"))  # the model itself fails: it drops one token of all pictures together
every_case = pytest.mark.parametrize(("tower", "strategy"), CASES)
SQUARE = [case for case in CASES if case[0] not in ("pixtral", "siglip2")]
every_square_case = pytest.mark.parametrize(("tower", "strategy"), SQUARE)
PIXELS = ("pixel_values", "pixel_attention_mask", "spatial_shapes", "image_sizes")


def run(model, inputs):
    """Logits; LLaVA does not hand SigLIP 2 its shapes, so its pictures are encoded by hand."""
    with torch.no_grad():
        if "spatial_shapes" not in inputs:
            return model(**inputs).logits
        given = {name: inputs[name] for name in PIXELS if name in inputs}
        encoded = model.model.get_image_features(**given, return_dict=True)
        text = {name: value for name, value in inputs.items() if name not in PIXELS}
        return model(**text, mm_encoder_outputs={"image": encoded}).logits


def looked(model, inputs, *reads):
    """The context of a run, with statistics."""
    look = Look(reads)
    with vtoken.reduce(model, look):
        run(model, inputs)
    return look.seen["ctx"]


def features(model, inputs):
    """(T, D) features of all image tokens, of a tower whose attention adds nothing: a patch sees only itself."""

    def zero(module, args, output):
        return (torch.zeros_like(output[0]), *output[1:])

    adapter = adapter_for(model)
    given = {name: inputs[name] for name in PIXELS if name in inputs}
    with contextlib.ExitStack() as stack, torch.no_grad():
        for block in range(len(adapter.tower_blocks)):
            stack.callback(adapter.vision_attention(block).register_forward_hook(zero).remove)
        return torch.cat(list(model.model.get_image_features(**given, return_dict=True).pooler_output))


def spare(tower, strategy):
    """Visual tokens before the first patch of a picture; -1 if the first patch is left out."""
    return tiny.LEADING.get(tower, 0) - (strategy == "default")


@every_square_case
def test_painting_a_patch_changes_the_token_whose_box_holds_it(tower, strategy):
    model, inputs = tiny.make("llava", (1,), tower=tower, strategy=strategy)
    found, before, first = vtoken.token_map(model, inputs), features(model, inputs), spare(tower, strategy)
    assert len(found) == len(before) == 16 + first
    assert found.box[: max(first, 0)].tolist() == [[0, 0, tiny.SIDE, tiny.SIDE]] * max(first, 0)
    for patch, (row, column) in enumerate(itertools.product(range(4), range(4))):
        y, x = row * tiny.PATCH, column * tiny.PATCH
        painted = dict(inputs, pixel_values=inputs["pixel_values"].clone())
        painted["pixel_values"][..., y : y + tiny.PATCH, x : x + tiny.PATCH] += 3.0
        changed = (features(model, painted) - before).abs().amax(1) > 1e-4
        wanted = [patch + first] if patch + first >= 0 else []
        assert changed.nonzero()[:, 0].tolist() == wanted
        assert all(found.box[token].tolist() == [x, y, x + tiny.PATCH, y + tiny.PATCH] for token in wanted)


def test_painting_pictures_of_unequal_size():
    model, inputs = tiny.make("llava", (1, 2), tower="pixtral")
    found, before = vtoken.token_map(model, inputs), features(model, inputs)
    assert found.sizes == tiny.PIXTRAL_SIZES
    for token in range(0, len(before), 7):
        x0, y0, x1, y1 = found.box[token].long().tolist()
        painted = dict(inputs, pixel_values=inputs["pixel_values"].clone())
        painted["pixel_values"][found.image[token], :, y0:y1, x0:x1] += 3.0
        changed = (features(model, painted) - before).abs().amax(1) > 1e-4
        assert changed.nonzero()[:, 0].tolist() == [token]


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_painting_lists_of_patches(strategy):
    """SigLIP 2: the second picture has 3 x 4 patches and four rows of padding, which have no box."""
    model, inputs = tiny.make("llava", (2,), tower="siglip2", strategy=strategy)
    found, before, first = vtoken.token_map(model, inputs), features(model, inputs), spare("siglip2", strategy)
    assert found.sizes == [(24, 24), (18, 24)]
    padding = torch.cat([torch.zeros(28 + 2 * first), torch.ones(4)]).bool()
    assert torch.equal(found.box.isnan().all(1), padding)
    assert torch.equal(found.view == -1, padding)
    for token in range(len(before)):
        image, patch = divmod(token, 16 + first)
        painted = dict(inputs, pixel_values=inputs["pixel_values"].clone())
        painted["pixel_values"][image, patch - first] += 3.0
        changed = (features(model, painted) - before).abs().amax(1) > 1e-4
        assert changed.nonzero()[:, 0].tolist() == [token]
        if not padding[token]:
            row, column = divmod(patch - first, 4)
            assert found.box[token, :2].tolist() == [column * tiny.PATCH, row * tiny.PATCH]


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@every_square_case
def test_statistics_equal_eager(tower, strategy, attn):
    (weights,) = eager_encoder("llava", (1, 1), -2, tower=tower, strategy=strategy)
    model, inputs = tiny.make("llava", (1, 1), attn=attn, tower=tower, strategy=strategy)
    first, skipped = tiny.LEADING.get(tower, 0), int(strategy == "default")
    mean = weights.mean(1)
    wanted = {"received": mean[:, first:].mean(1), "given": mean[:, :, first:].mean(2)}
    if first:
        wanted |= {"cls": mean[:, 0], "best": mean[:, 0]}
    else:
        wanted["best"] = wanted["received"]
    ctx = looked(model, inputs, *(EncoderRead(what) for what in wanted))
    for read, values in ctx.encoder.items():
        torch.testing.assert_close(values, wanted[read.what][:, skipped:], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("tower", ["clip", "siglip", "aimv2", "vit", "dinov2_with_registers"])
def test_keys_and_logits_equal_the_projections(tower):
    """Towers without rotary embeddings, where a key is what its projection gives."""
    model, inputs = tiny.make("llava", (2,), tower=tower, strategy="full")
    attention, seen = adapter_for(model).vision_attention(-2), {}
    reads = [EncoderRead("keys"), *([EncoderRead("cls_logits")] if tiny.LEADING.get(tower) else [])]
    with contextlib.ExitStack() as stack:
        for name in ("q_proj", "k_proj"):
            hook = getattr(attention, name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
            stack.callback(hook.remove)
        ctx = looked(model, inputs, *reads)
    query, key = (seen[name].unflatten(-1, (4, 8)) for name in ("q_proj", "k_proj"))
    wanted = {"keys": key.mean(2), "cls_logits": (query[:, :1] * key).sum(-1).mean(2) / 8**0.5}
    for read, values in ctx.encoder.items():
        torch.testing.assert_close(values, wanted[read.what], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attn", ["eager", "sdpa", "flash"])
def test_pictures_in_one_sequence_are_read_one_by_one(attn, monkeypatch):
    """Pixtral: as if each picture were encoded alone."""
    (weights,) = eager_encoder("llava", (1, 2), -2, tower="pixtral")
    model, inputs = tiny.make("llava", (1, 2), tower="pixtral", attn="sdpa" if attn == "flash" else attn)
    if attn == "flash":
        flash.install(monkeypatch, model)
    ctx = looked(model, inputs, EncoderRead("received"))
    assert attn != "flash" or "varlen" in flash.CALLS
    (found,) = ctx.encoder.values()
    start = 0
    for image, (height, width) in enumerate(tiny.PIXTRAL_SIZES):
        here = slice(start, start := start + height * width // tiny.PATCH**2)
        wanted = weights.mean(1)[0][here, here].mean(0)
        torch.testing.assert_close(found[image, : len(wanted)], wanted, atol=1e-6, rtol=1e-4)
        assert found[image, len(wanted) :].isnan().all()


def test_packed_pictures_under_flash_attention(monkeypatch):
    """Qwen's towers hand flash attention one sequence with its borders: the same statistics as picture by picture."""
    read = EncoderRead("received", -1)
    model, inputs = tiny.make("qwen2_vl", (1, 2))
    wanted = looked(model, inputs, read).encoder[read]
    flash.install(monkeypatch, model)
    found = looked(model, inputs, read).encoder[read]
    assert "varlen" in flash.CALLS
    torch.testing.assert_close(found, wanted, equal_nan=True, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_padding_is_left_out_of_the_statistics(attn):
    model, inputs = tiny.make("llava", (2,), tower="siglip2", attn=attn)
    found = looked(model, inputs, EncoderRead("received")).encoder[EncoderRead("received")]
    assert found[1, 12:].isnan().all()
    short = {name: inputs[name][1:, :12] for name in ("pixel_values", "pixel_attention_mask")}
    ids = {name: inputs[name][:, :1] for name in ("input_ids", "attention_mask")}
    single = tiny.assemble([[3, torch.full((12,), tiny.IMAGE_ID), 2]], torch.Generator().manual_seed(0))
    whole = {**ids, **single, **short, "spatial_shapes": inputs["spatial_shapes"][1:]}
    wanted = looked(model, whole, EncoderRead("received")).encoder[EncoderRead("received")]
    torch.testing.assert_close(found[1:, :12], wanted, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found[0].sum(), torch.tensor(1.0))


REFUSED = {
    "globalcom2": (r"no \[CLS\] token", lambda tower, strategy: tower not in tiny.LEADING),
    "tower-prune": ("cannot be cut along", lambda tower, strategy: tower in ("dinov3", "pixtral", "siglip2")),
    "ipcv": ("cannot be cut along", lambda tower, strategy: tower in ("dinov3", "pixtral", "siglip2")),
    "pixelprune": ("is not known to compute", lambda tower, strategy: True),
    "downsample": (
        "lists of patches|leaves out the first|one size of pictures",
        lambda tower, strategy: tower in ("siglip2", "aimv2") or spare(tower, strategy) != 0,
    ),
}


@every_case
def test_every_reducer(tower, strategy):
    """The budget is exact, the numbers are finite; or a sentence says what the tower lacks."""
    model, inputs = tiny.make("llava", (1, 2), tower=tower, strategy=strategy)
    found = vtoken.token_map(model, inputs)
    padding = torch.bincount(found.image[found.view < 0], minlength=3)
    lengths = torch.bincount(found.image)
    for name in vtoken.list_reducers():
        reducer = built(name, 0.5)
        message, refuses = REFUSED.get(name, ("", lambda *case: False))
        with vtoken.reduce(model, reducer):
            if refuses(tower, strategy):
                with pytest.raises(ValueError, match=message):
                    run(model, inputs)
                continue
            assert run(model, inputs).isfinite().all(), name
            images = vtoken.stats(model).images
            *_, last = vtoken.token_map(model, inputs).kept.values()
        assert [image.tokens for image in images] == lengths.tolist(), name
        kept = torch.bincount(found.image[last], minlength=3)
        assert kept.tolist() == [image.kept_last for image in images], name
        if isinstance(reducer, KeepReducer) and reducer.stages == ("before_llm",) and name != "downsample":
            extra = padding if reducer.newlines == "keep" else 0 * padding  # separators that stay on top
            wanted = ((lengths - extra) / 2).round().long() + extra
            assert [image.kept for image in images] == wanted.tolist(), name


@pytest.mark.parametrize(
    ("tower", "strategy", "name"), [*((*case, "visionzip") for case in CASES), ("pixtral", "full", "downsample")]
)
def test_batch_equals_alone(tower, strategy, name):
    """With a reducer that reads attention and keys; pictures of unequal size are packed or padded."""
    model, inputs = tiny.make("llava", (1, 2), tower=tower, strategy=strategy)
    with vtoken.reduce(model, name, keep=0.5):
        together = run(model, inputs)
        single = alone({k: v for k, v in inputs.items() if k not in PIXELS[1:]}, 0, (1, 2))
        single |= {name: inputs[name][:1] for name in PIXELS[1:] if name in inputs}
        if tower == "pixtral":
            single["pixel_values"] = single["pixel_values"][..., :24, :48]
        logits = run(model, single)
    torch.testing.assert_close(together[:1, -logits.shape[1] :], logits, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("tower", ["dinov2_with_registers", "dinov3", "pixtral"])
def test_generation(tower):
    """`generate` encodes before the forward pass: keeping all is unwrapped, keeping few goes on."""
    model, inputs = tiny.make("llava", (1, 2), tower=tower)
    plain = generate(model, inputs, 3)
    with vtoken.reduce(model, "idpruner", keep=1.0):
        assert torch.equal(generate(model, inputs, 3), plain)
    with vtoken.reduce(model, "idpruner", keep=4):
        generate(model, inputs, 3)
        assert [image.kept for image in vtoken.stats(model).images] == [4, 4, 4]


@pytest.mark.parametrize("tower", ["clip", "dinov2_with_registers"])
def test_a_patch_dropped_in_the_tower_takes_no_leading_token_with_it(tower):
    """[CLS] and registers that the model shows stay when patches leave the tower."""
    model, inputs = tiny.make("llava", (1,), tower=tower, strategy="full")
    leading = tiny.LEADING[tower]
    with vtoken.reduce(model, vtoken.TowerPrune(keep=0.25, block=1)):
        run(model, inputs)
        (_, kept), *_ = vtoken.stats(model).kept
    assert kept[0, :leading].all()
    assert int(kept[0, leading:].sum()) == 4


def test_a_token_that_the_embeddings_do_not_name_is_reported():
    model, inputs = tiny.make("llava", (1,), tower="clip", strategy="full")
    embeddings = adapter_for(model).tower.embeddings
    twice = embeddings.register_forward_hook(lambda m, a, out: torch.cat([out[:, :1], out], 1))
    try:
        with pytest.raises(RuntimeError, match="4 x 4 patches became 18 visual tokens, where 17 are expected"):
            vtoken.token_map(model, inputs)
    finally:
        twice.remove()


# masks --------------------------------------------------------------------------------------------------------------


def test_masks_of_pictures_and_padding():
    pictures = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool()[None, None]
    assert separated(pictures, None, 1, 5) == ((0, 0, 2), (0, 2, 5))
    additive = torch.zeros(1, 1, 5, 5).masked_fill(~pictures, torch.finfo(torch.float32).min)
    assert separated(additive, None, 1, 5) == ((0, 0, 2), (0, 2, 5))
    padding = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    for mask in (padding, padding[:, None, None], padding[:, None, None].expand(-1, -1, 4, -1)):
        assert separated(mask, None, 2, 4) == ((0, 0, 3), (1, 0, 4))
    hidden = padding[:, None, None] & padding[:, None, :, None]  # rows of padding see nothing
    assert separated(hidden, None, 2, 4) == ((0, 0, 3), (1, 0, 4))
    assert separated(None, torch.tensor([0, 2, 5]), 1, 5) == ((0, 0, 2), (0, 2, 5))
    assert separated(None, None, 1, 5) is None


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(4, 4).tril().bool(),
        torch.tensor([[1, 1, 1], [0, 1, 0], [1, 1, 1]]).bool(),
        torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]]).bool(),
        -torch.arange(9.0).view(3, 3),
    ],
    ids=["causal", "nested", "broken", "biased"],
)
def test_other_masks_are_refused(mask):
    with pytest.raises(ValueError, match="more than the borders of pictures"):
        separated(mask[None, None], None, 1, len(mask))


# windows ------------------------------------------------------------------------------------------------------------


def plant(model, patch, weak=None):
    """In all blocks of the tower every query likes the key of row ``patch``, and a little less that of ``weak``.

    Returns what undoes it when closed. The direction is one that rotary embeddings hardly turn: the low frequencies of
    a head of eight.
    """
    adapter = adapter_for(model)
    liked = torch.tensor([0.0, 1, 0, 1, 0, 0, 0, 0]).repeat(4) * 12

    def queries(out):
        return liked.expand_as(out)

    def keys(out):
        rows = torch.zeros_like(out)
        rows[..., patch, :] = liked
        if weak is not None:
            rows[..., weak, :] = 0.8 * liked
        return rows

    stack = contextlib.ExitStack()
    for number in range(len(adapter.tower_blocks)):
        attention = adapter.vision_attention(number)
        if hasattr(attention, "qkv"):

            def fused(module, args, out):
                query, key, value = out.chunk(3, -1)
                return torch.cat([queries(query), keys(key), value], -1)

            stack.callback(attention.qkv.register_forward_hook(fused).remove)
            continue
        for name, make in (("q_proj", queries), ("k_proj", keys)):
            hook = getattr(attention, name).register_forward_hook(lambda m, a, out, make=make: make(out))
            stack.callback(hook.remove)
    return stack


WHOLE = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3", "gemma3", "paligemma", *tiny.TOWERS]


@pytest.mark.parametrize("layer", [-2, -1, 0.34])
@pytest.mark.parametrize("family", WHOLE)
def test_a_planted_key_wins_over_the_whole_picture(family, layer):
    """All attention of the picture goes to its token, also from patches in other windows."""
    if family in tiny.TOWERS:
        model, inputs = tiny.make("llava", (1,), tower=family)
    else:
        model, inputs = tiny.make(family, (1,))
    if family == "qwen2_5_vl":
        model.model.visual.fullatt_block_indexes = [0]  # before all that is read here
    patch = 9 if family in tiny.TOWERS else 5
    with plant(model, patch + tiny.LEADING.get(family, 0)):
        ctx = looked(model, inputs, EncoderRead("received", layer))
    (found,) = ctx.encoder.values()
    assert float(found[0].nan_to_num().max() / found[0].nansum()) > 0.95
    pooled = family in ("gemma3", "mistral3") or "qwen" in family  # four patches to a token
    assert float(found[0].nan_to_num().max()) == pytest.approx(0.25 if pooled else 1, abs=0.02)


def test_only_a_global_block_tells(monkeypatch):
    """In a windowed block the same key wins its window alone, and the others receive as much in theirs."""
    model, inputs = tiny.make("qwen2_5_vl", (1,))
    monkeypatch.setattr(type(adapter_for(model)), "global_blocks", (0, 1, 2))
    with plant(model, 5):
        (found,) = looked(model, inputs, EncoderRead("received", 0)).encoder.values()
    windows = 6  # of 2 x 2 tokens, in 4 x 6 tokens
    assert float(found[0].max() / found[0].sum()) == pytest.approx(1 / windows, abs=0.01)


@pytest.mark.parametrize("name", ["fopru", "idpruner", "hiprune", "visionzip", "prumerge", "todre"])
def test_reducers_find_what_the_whole_picture_looks_at(name):
    """One token is kept of a windowed tower: the one that all patches attend to, not the first that wins a window."""
    model, inputs = tiny.make("qwen2_5_vl", (1,))
    model.model.visual.fullatt_block_indexes = [0]  # before all that the reducers read by default
    with plant(model, 41, weak=5), vtoken.reduce(model, name, keep=1):  # row 1, column 4, and row 0, column 1 of 4 x 6
        run(model, inputs)
        (_, kept), *_ = vtoken.stats(model).kept
    assert kept[0].nonzero()[:, 0].tolist() == [10]


def test_blocks_that_attend_in_windows():
    model, inputs = tiny.make("qwen2_5_vl", (1,))
    adapter = adapter_for(model)
    assert adapter.global_blocks == (1,)
    assert [adapter.read_block(layer) for layer in (-1, -2, -3, 0.1, 0.5, 0.9, 1)] == [1] * 7
    for number in (0, 2):
        with (
            vtoken.reduce(model, Look((EncoderRead("received", number),))),
            pytest.raises(ValueError, match=rf"Block {number} .* windows, .*whole picture \(1\)"),
        ):
            run(model, inputs)
    with (
        vtoken.reduce(model, "visionzip", keep=0.5, layer=2),
        pytest.raises(ValueError, match=r"Block 2 .*whole picture \(1\)"),
    ):
        run(model, inputs)
    assert adapter_for(tiny.make("qwen3_vl")[0]).global_blocks == (0, 1, 2)


@dataclass
class Config:
    layer_types: list[str]


class Tower(nn.Module):
    """Six blocks, and what a tower of some family says of them."""

    def __init__(self, config=None, sizes=None, **said):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(6))
        for block, size in zip(self.blocks, sizes or [], strict=False):
            block.window_size = size
        self.config = config
        vars(self).update(said)


@pytest.mark.parametrize(
    ("tower", "wanted"),
    [
        (Tower(), (0, 1, 2, 3, 4, 5)),
        (Tower(fullatt_block_indexes=[2, 5]), (2, 5)),
        (Tower(global_attn_indexes=(2, 5)), (2, 5)),
        (Tower(window_block_indices=[0, 1, 3]), (2, 4, 5)),
        (Tower(Config(["sliding_attention", "full_attention"] * 3)), (1, 3, 5)),
        (Tower(Config(["sliding_attention"] * 4)), (0, 1, 2, 3, 4, 5)),  # of a decoder of another depth
        (Tower(sizes=[14, 14, 0, 14, 14, 0]), (2, 5)),
    ],
)
def test_what_towers_say_of_their_blocks(tower, wanted):
    assert towers.global_blocks(tower, tower.blocks) == wanted


def test_a_tower_of_windows_alone_is_refused():
    model, inputs = tiny.make("qwen2_5_vl", (1,))
    model.model.visual.fullatt_block_indexes = []
    with vtoken.reduce(model, "fopru", keep=0.5), pytest.raises(ValueError, match=r"All 3 blocks .* in windows"):
        run(model, inputs)
    with vtoken.reduce(model, "divprune", keep=0.5):
        run(model, inputs)


def test_no_patches_are_dropped_in_a_tower_with_windows():
    model, inputs = tiny.make("llava", (1,), tower="siglip")
    model.model.vision_tower.encoder.layers[1].window_size = 2
    with vtoken.reduce(model, "tower-prune", keep=0.5), pytest.raises(ValueError, match="no patches can be dropped"):
        run(model, inputs)
