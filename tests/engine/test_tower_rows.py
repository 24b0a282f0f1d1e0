# SPDX-License-Identifier: Apache-2.0
"""Patches that never enter a packed tower (pixelprune), and patches that leave a tower and come back (ipcv)."""

from __future__ import annotations

import contextlib
import sys

import pytest
import tiny
import torch
from oracles import GREEDY, TOLERANCE, Look, check_rows_and_masking, extended, generate

import vtoken
from vtoken.adapters import adapter_for
from vtoken.encoder import EncoderRead
from vtoken.engine.tower import feature_list

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
every_qwen = pytest.mark.parametrize("family", QWEN)
every_tower = pytest.mark.parametrize("family", [*QWEN, "internvl", "llava"])
BLOCK, NEIGHBOURS = 1, 3
DEPTH = 3
RETURN = vtoken.IPCV(keep=0.4, block=BLOCK, neighbours=NEIGHBOURS, stabilised=1)
PLANS = {
    "enter": vtoken.PixelPrune(),
    "budget": vtoken.PixelPrune(keep=0.5),
    "enter, then before": vtoken.Chain([vtoken.PixelPrune(), vtoken.DivPrune(keep=0.25)]),
    "enter, then inside": vtoken.Chain([vtoken.PixelPrune(), vtoken.FastV(keep=0.2, layer=2)]),
    "return": RETURN,
    "return, then before": vtoken.Chain([RETURN, vtoken.DivPrune(keep=0.5)]),
}
every_plan = pytest.mark.parametrize("plan", PLANS)


# ---------------------------------------------------------------------------------------------------- pages
def page(inputs, flat=0.75, seed=3):
    """The same prompt with pages: most tokens show paper, the others one of three other cells."""
    generator = torch.Generator().manual_seed(seed)
    name = "pixel_values_videos" if "pixel_values_videos" in inputs else "pixel_values"
    rows = inputs[name]
    cells = torch.randn(4, 4 * rows.shape[1], generator=generator)
    kinds = torch.randint(1, 4, (len(rows) // 4,), generator=generator)
    kinds[torch.rand(len(kinds), generator=generator) < flat] = 0
    return {**inputs, name: cells[kinds].view_as(rows)}


def make(family, batch=(1, 2), **options):
    model, inputs = tiny.make(family, batch, **options)
    return model, page(inputs) if family in QWEN else inputs


def grids(inputs):
    return inputs["video_grid_thw" if "video_grid_thw" in inputs else "image_grid_thw"].tolist()


def pictures(inputs, merge=2):
    """Tokens of every time step, as lists of rows of flat vectors."""
    rows = inputs["pixel_values_videos" if "pixel_values_videos" in inputs else "pixel_values"]
    cells, start, found = rows.reshape(-1, merge**2 * rows.shape[1]), 0, []
    for t, h, w in grids(inputs):
        for _ in range(t):
            count = h * w // merge**2
            part = cells[start : start + count]
            found.append([[part[r * (w // merge) + c] for c in range(w // merge)] for r in range(h // merge)])
            start += count
    return found


def loop(picture, tau=0.0, anchored=True, distance=lambda a, b: (a - b).abs().max()):
    """Kept cells of one picture, and what it looks like after, cell by cell."""
    kept, seen = [], [[None] * len(picture[0]) for _ in picture]
    for r, line in enumerate(picture):
        for c, cell in enumerate(line):
            source = seen if anchored else picture
            left = source[r][c - 1] if c else None
            above = source[r - 1][c] if r else None
            guess = left if r == 0 else above
            if r and c:
                corner = source[r - 1][c - 1]
                guess = above if distance(corner, left) <= tau and not distance(corner, above) <= tau else left
            keep = guess is None or not distance(cell, guess) <= tau
            kept.append(keep)
            seen[r][c] = cell if keep else guess
    return kept, [cell for line in seen for cell in line]


def predicted(inputs):
    """(T,) bool in the order of the prompt: tokens that stay, by the plain loop."""
    return torch.tensor([keep for picture in pictures(inputs) for keep in loop(picture)[0]])


# ---------------------------------------------------------------------------------------------------- towers
def features(model, inputs):
    """All that leaves the tower for the decoder: (T, D), several where features of inner layers do."""
    names = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    call = {name: inputs[name] for name in names if name in inputs}
    read = model.model.get_video_features if "video_grid_thw" in inputs else model.model.get_image_features
    with torch.no_grad():
        found = read(**call, return_dict=True)
    return [torch.cat(feature_list(part)) for part in (found, *(getattr(found, "deepstack_features", None) or ()))]


def in_windows(model, inputs):
    """(T,) long: the token at each place of the tower's sequence, window by window."""
    vision, order, start = model.config.vision_config, [], 0
    for t, h, w in grids(inputs):
        h, w = h // 2, w // 2
        side = getattr(vision, "window_size", 0) // 2 // vision.patch_size or max(h, w)
        for step in range(t):
            first = start + step * h * w
            for top in range(0, h, side):
                for west in range(0, w, side):
                    for r in range(top, min(top + side, h)):
                        order += [first + r * w + c for c in range(west, min(west + side, w))]
        start += t * h * w
    return torch.tensor(order)


def sharpen(model):
    """Weights as large as those of trained towers: attention then matters."""
    with torch.no_grad():
        for block in adapter_for(model).tower_blocks:
            for parameter in block.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(0.2 / parameter.std())


@contextlib.contextmanager
def hiding(model, gone):
    """Eager attention of the tower in which the rows ``gone(block)`` (flat, or None) are hidden as keys."""
    adapter = adapter_for(model)
    numbers = {adapter.vision_attention(i): i for i in range(len(adapter.tower_blocks))}
    source = sys.modules[type(adapter.vision_attention(0)).__module__]
    original, seen = source.eager_attention_forward, {}

    def attend(module, query, key, value, *args, **kwargs):
        if module not in numbers:
            return original(module, query, key, value, *args, **kwargs)
        number, (views, _, rows, _) = numbers[module], query.shape
        start = seen.get(number, 0)
        seen[number] = start + views * rows
        logits = query @ key.mT * kwargs["scaling"]
        if (hidden := gone(number)) is not None:
            part = hidden[start : start + views * rows].view(views, 1, 1, rows)
            logits = logits.masked_fill(part, torch.finfo(logits.dtype).min)
        weights = logits.softmax(-1)
        return (weights @ value).transpose(1, 2), weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "eager_attention_forward", attend)
        yield


def kept_tokens(model):
    """(T,) bool over the visual tokens in the order of the features."""
    stats = vtoken.stats(model)
    return torch.cat([row[:n] for row, n in zip(stats.kept[0][1], stats.tokens.tolist(), strict=True)])


# ---------------------------------------------------------------------------------------------------- pixelprune
@pytest.mark.parametrize("video", [False, True])
@pytest.mark.parametrize("family", [*QWEN, "qwen3_5"])
def test_the_tower_computes_kept_patches_as_if_the_others_were_hidden(family, video):
    """Kept are those that the plain loop keeps; what they become is what a full-length tower makes of them."""
    options = {"video": True} if video else {}
    if family == "qwen3_5" and video:
        pytest.skip("the tiny model has no clips")
    model, inputs = tiny.make(family, (1, 2), attn="eager", **options)
    inputs = page(inputs)
    stays = predicted(inputs)
    assert 0.3 < stays.float().mean() < 0.8
    sharpen(model)
    plain = features(model, inputs)
    gone = ~stays[in_windows(model, inputs)].repeat_interleave(4)
    with hiding(model, lambda block: gone):
        wanted = features(model, inputs)
    model.set_attn_implementation("sdpa")
    with vtoken.reduce(model, "pixelprune"), torch.no_grad():
        found = features(model, inputs)
        model(**inputs)
        assert torch.equal(kept_tokens(model), stays)
        assert vtoken.stats(model).patches == (4 * len(stays), 4 * int(stays.sum()))
    assert len(found) == (3 if family == "qwen3_vl" else 1)
    for ours, theirs, whole in zip(found, wanted, plain, strict=True):
        assert ours.shape == whole.shape
        torch.testing.assert_close(ours[stays], theirs[stays], **TOLERANCE)
        assert (ours - whole)[stays].abs().max() > 1e-2, "attention to dropped patches is gone"


def first_linear(module):
    return next(part for part in module.modules() if isinstance(part, torch.nn.Linear))


@every_qwen
def test_no_module_of_the_tower_computes_a_dropped_patch(family):
    model, inputs = make(family)
    tower, rows = model.model.visual, []
    stays = int(predicted(inputs).sum())
    mergers = [tower.merger, *getattr(tower, "deepstack_merger_list", ())]
    for module in (tower.patch_embed.proj, *(first_linear(part) for part in (*tower.blocks, *mergers))):
        module.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    outside = []
    for block in tower.blocks:
        block.register_forward_hook(lambda module, args, out: outside.append(out.shape[0]))
    with vtoken.reduce(model, "pixelprune"):
        features(model, inputs)
    assert sorted(rows) == sorted([4 * stays] * (1 + DEPTH) + [stays] * len(mergers))
    assert outside == [len(inputs["pixel_values"])] * DEPTH, "as recorded hidden states"


@every_qwen
def test_a_planted_patch_stays(family):
    """On an empty page: the first token, the planted one, and the two whose neighbour it is."""
    model, inputs = tiny.make(family, (1,))
    inputs = page(inputs, flat=1.0)
    _, rows, columns = (n // 2 for n in grids(inputs)[0])
    r, c = rows - 2, columns - 3
    place = r * columns + c
    inputs["pixel_values"][4 * place + 1, 5] += 1.0
    with vtoken.reduce(model, "pixelprune"), torch.no_grad():
        model(**inputs)
        found = kept_tokens(model).nonzero()[:, 0].tolist()
    assert found == [0, place, place + 1, place + columns]
    assert torch.equal(predicted(inputs).nonzero()[:, 0], torch.tensor(found))


def hooks(model):
    return [(sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def test_what_is_not_predicted_is_bit_identical():
    for family in QWEN:
        model, inputs = tiny.make(family, (1, 2))  # noise, of which nothing repeats
        with torch.no_grad():
            plain, ids = model(**inputs).logits, generate(model, inputs, 3)
            before = hooks(model)
            with vtoken.reduce(model, "pixelprune"):
                assert torch.equal(model(**inputs).logits, plain)
                assert torch.equal(generate(model, inputs, 3), ids)
            assert hooks(model) == before
            plain = model(**page(inputs)).logits
            with vtoken.reduce(model, vtoken.PixelPrune(keep=1.0)):
                assert torch.equal(model(**page(inputs)).logits, plain)


@pytest.mark.parametrize("keep", [0.5, 0.1, 3, 1])
def test_a_budget_is_exact_and_ranks_the_error_of_prediction(keep):
    model, inputs = make("qwen2_5_vl")
    wanted = []
    for picture in pictures(inputs):
        flat = [cell for line in picture for cell in line]
        width = len(picture[0])
        _, errors = loop(picture, anchored=False), []
        for n, cell in enumerate(flat):
            r, c = divmod(n, width)
            left, above = (flat[n - 1] if c else None), (flat[n - width] if r else None)
            guess = left if r == 0 else above
            if r and c:
                corner = flat[n - width - 1]
                guess = above if torch.equal(corner, left) and not torch.equal(corner, above) else left
            scale = torch.tensor(vtoken_std()).repeat_interleave(32).repeat(4)
            errors.append(float("inf") if guess is None else float(((cell - guess).abs() * scale).max()))
        count = keep if isinstance(keep, int) else round(keep * len(flat))
        order = sorted(range(len(flat)), key=lambda n: (-errors[n], n))[:count]
        wanted.append([n in order for n in range(len(flat))])
    with vtoken.reduce(model, "pixelprune", keep=keep), torch.no_grad():
        model(**inputs)
        kept = [row[:n].tolist() for row, n in zip(vtoken.stats(model).kept[0][1], map(len, wanted), strict=True)]
    assert kept == wanted


def vtoken_std():
    """Of the processor of Qwen2-VL and Qwen2.5-VL, which all use the numbers of CLIP."""
    return [0.26862954, 0.26130258, 0.27577711]


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("metric", ["max", "mae", "rmse"])
def test_a_threshold_is_the_plain_loop(metric, anchored):
    """Slow changes add up where a cell is compared with pixels, and do not where it is with what is left of them."""
    generator = torch.Generator().manual_seed(5)
    pixels = (torch.rand(2, 6, 7, 1, generator=generator) * 0.1).cumsum(2) + torch.rand(6, generator=generator) * 0.03
    distance = {
        "max": lambda a, b: (a - b).abs().max(),
        "mae": lambda a, b: (a - b).abs().mean(),
        "rmse": lambda a, b: ((a - b) ** 2).mean().sqrt(),
    }[metric]
    source = vtoken.reducers.pixelprune.predicted(pixels, 0.07, metric, anchored)
    flat, kept = pixels.flatten(0, 2), source == torch.arange(84)
    wanted = [loop([list(line) for line in step], 0.07, anchored, distance) for step in pixels]
    assert kept.tolist() == [keep for found, _ in wanted for keep in found]
    assert 0.2 < kept.float().mean() < 0.9
    if anchored:
        assert torch.equal(flat[source], torch.stack([cell for _, seen in wanted for cell in seen]))
        assert distance(flat[source][:1], flat[:1]) <= 0.07
    assert torch.equal(source[source], source), "what stands for a cell is kept"


def test_the_normalisation_is_undone():
    """A threshold is in pixels: half of it at half of the processor's scale."""
    model, inputs = make("qwen3_vl", (1,))
    inputs["pixel_values"] = inputs["pixel_values"] * 0.01
    counts = {}
    for std, tau in ((None, 0.04), ((0.5,) * 3, 0.04), ((1.0,) * 3, 0.08), ((1.0,) * 3, 0.04)):
        with vtoken.reduce(model, vtoken.PixelPrune(tau=tau, std=std)), torch.no_grad():
            model(**inputs)
            counts[std, tau] = vtoken.stats(model).tokens_kept
    assert counts[None, 0.04] == counts[(0.5,) * 3, 0.04] == counts[(1.0,) * 3, 0.08]
    assert counts[None, 0.04] < counts[(1.0,) * 3, 0.04]


# ---------------------------------------------------------------------------------------------------- ipcv
class Rebuilding:
    """A full-length tower in which the rows that `vtoken.IPCV` drops are put in by plain loops behind every block."""

    def __init__(self, model, inputs, keep):
        self.adapter, self.keep = adapter_for(model), keep
        self.first = self.adapter.leading_tokens
        self.lengths = [t * h * w for t, h, w in grids(inputs)] if "image_grid_thw" in inputs else None
        self.handles, self.gone = [], None
        blocks = self.adapter.tower_blocks
        self._hook(blocks[BLOCK - 1].register_forward_pre_hook(self.note))
        self._hook(blocks[BLOCK].register_forward_pre_hook(self.choose))
        for block in blocks[BLOCK:]:
            self._hook(block.register_forward_hook(self.rebuild, prepend=True))

    def _hook(self, handle):
        self.handles.append(handle)

    def note(self, module, args):
        self.before = args[0].flatten(0, -2)

    def choose(self, module, args):
        self.start = args[0].flatten(0, -2)
        lengths = self.lengths or [args[0].shape[1]] * len(args[0])
        self.gone, self.near, first = torch.zeros(len(self.start), dtype=torch.bool), {}, 0
        for length in lengths:
            patches = list(range(first + self.first, first + length))
            change = {n: float((self.start[n] - self.before[n]).norm()) for n in patches}
            kept = sorted(patches, key=lambda n: -change[n])[: round(self.keep * len(patches))]
            for n in set(patches) - set(kept):
                gap = {m: float((self.start[n] - self.start[m]).norm()) for m in kept}
                self.near[n] = sorted(kept, key=gap.get)[:NEIGHBOURS]
                self.gone[n] = True
            first += length
        self.views = len(lengths)

    @property
    def patches(self):
        """All patches, and those that stay; [CLS] is none."""
        leading = self.first * self.views
        return len(self.gone) - leading, int((~self.gone).sum()) - leading

    def rebuild(self, module, args, output):
        flat = output.flatten(0, -2).clone()
        for n, near in self.near.items():
            flat[n] = self.start[n] + sum(flat[m] - self.start[m] for m in near) / len(near)
        return flat.view_as(output)

    def hidden(self, whole):
        return lambda block: self.gone if block >= BLOCK + whole else None


@pytest.mark.parametrize("whole", [0, 1, 2])
@every_tower
def test_the_tower_drops_and_rebuilds_as_plain_loops_do(family, whole):
    model, inputs = tiny.make(family, (1, 2), attn="eager")
    sharpen(model)
    plain = features(model, inputs)
    oracle = Rebuilding(model, inputs, 0.4)
    with hiding(model, oracle.hidden(whole)):
        wanted = features(model, inputs)
    for handle in oracle.handles:
        handle.remove()
    model.set_attn_implementation("sdpa")
    reducer = vtoken.IPCV(keep=0.4, block=BLOCK, neighbours=NEIGHBOURS, stabilised=whole)
    with vtoken.reduce(model, reducer), torch.no_grad():
        found = features(model, inputs)
        model(**inputs)
        stats = vtoken.stats(model)
    assert stats.tokens_kept == stats.tokens_in, "all tokens enter the language model"
    assert stats.patches == oracle.patches
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
    assert (found[0] - plain[0]).abs().max() > 1e-2


@every_tower
def test_later_blocks_compute_few_rows_and_the_first_ones_all_but_their_network(family):
    model, inputs = tiny.make(family, (1, 2))
    blocks = adapter_for(model).tower_blocks
    attended, fed, outside = [], [], []
    for number, block in enumerate(blocks):
        adapter_for(model).vision_attention(number).register_forward_pre_hook(
            lambda module, args, kwargs: attended.append((*args, *kwargs.values())[0].shape[:-1].numel()),
            with_kwargs=True,
        )
        first_linear(block.mlp).register_forward_pre_hook(lambda module, args: fed.append(args[0].shape[:-1].numel()))
        block.register_forward_hook(lambda module, args, out: outside.append(out.shape[:-1].numel()))
    features(model, inputs)
    rows = fed[0]
    for seen in (attended, fed, outside):
        seen.clear()
    with vtoken.reduce(model, RETURN):
        features(model, inputs)
    few = fed[1]
    assert few < rows
    assert (attended, fed, outside) == ([rows, rows, few], [rows, few, few], [rows] * 3)


# ---------------------------------------------------------------------------------------------------- both
@every_plan
@every_qwen
def test_batch_equals_alone_and_masking(family, plan):
    """Pictures of unequal size, rows with none, one and two of them."""
    batch = (1, 2, 0)
    model, inputs = make(family, batch)
    check_rows_and_masking(model, inputs, PLANS[plan], batch, 3)


@pytest.mark.parametrize("plan", ["enter, then before", "return"])
@every_qwen
def test_generate_equals_no_cache(family, plan):
    model, inputs = make(family)
    length = inputs["input_ids"].shape[1]
    with vtoken.reduce(model, PLANS[plan]), torch.no_grad():
        out = generate(model, inputs, 3, output_logits=True, return_dict_in_generate=True)
        for step in range(3):
            longer = extended(model, inputs, out.sequences[:, length : length + step])
            wanted = model(**longer, use_cache=False).logits[:, -1]
            torch.testing.assert_close(out.logits[step], wanted, **TOLERANCE)


@pytest.mark.parametrize("plan", ["enter", "return, then before"])
@every_qwen
def test_shortened_inputs_equal_the_wrapped_model(family, plan):
    if not tiny.ENCODED_INPUT:
        pytest.skip("needs transformers >= 5.18")
    model, inputs = make(family)
    with vtoken.reduce(model, PLANS[plan]):
        wanted = generate(model, inputs, 3)[:, -3:]
    short = vtoken.shorten(model, inputs, PLANS[plan])
    assert torch.equal(model.generate(**short, max_new_tokens=3, **GREEDY)[:, -3:], wanted)


@every_qwen
def test_positions_are_those_of_the_full_grid(family):
    """The decoder, shown the kept features alone at the positions of the whole prompt, says the same."""
    model, inputs = make(family, (1,))
    seen = {}
    rotary = model.model.language_model.rotary_emb
    handle = rotary.register_forward_pre_hook(lambda module, args: seen.update(position_ids=args[1]))
    with torch.no_grad():
        model(**inputs)
        whole = seen["position_ids"]
        with vtoken.reduce(model, "pixelprune"):
            model(**inputs)
            kept = kept_tokens(model)
    handle.remove()
    there = torch.ones_like(inputs["input_ids"][0], dtype=torch.bool)
    there[inputs["input_ids"][0] == tiny.IMAGE_ID] = kept
    assert torch.equal(seen["position_ids"], whole[..., there])


def test_the_map_of_tokens_says_what_entered():
    model, inputs = make("qwen2_5_vl")
    with vtoken.reduce(model, "pixelprune"), torch.no_grad():
        model(**inputs)
        found = vtoken.token_map(model, inputs)
        assert "patches" in str(vtoken.stats(model))
    assert torch.equal(found.kept[0], predicted(inputs))


@pytest.mark.parametrize("what", ["received", "keys"])
@every_qwen
def test_statistics_of_what_entered(family, what):
    """Dropped tokens have none; those of kept ones are of the shorter sequence, in the order of the prompt."""
    model, inputs = make(family, (2,), attn="eager")
    stays, look = predicted(inputs), Look((EncoderRead(what, 1),))
    gone = ~stays[in_windows(model, inputs)].repeat_interleave(4)
    with hiding(model, lambda block: gone), vtoken.reduce(model, look), torch.no_grad():
        model(**inputs)
        whole = look.seen["ctx"].encoder[EncoderRead(what, 1)]
    model.set_attn_implementation("sdpa")
    with vtoken.reduce(model, vtoken.Chain([vtoken.PixelPrune(), look])), torch.no_grad():
        model(**inputs)
        ctx = look.seen["ctx"]
    values = ctx.encoder[EncoderRead(what, 1)]
    assert torch.equal((values if what == "received" else values[..., 0]).isfinite(), ctx.candidates)
    if what == "keys":
        torch.testing.assert_close(values[ctx.candidates], whole[ctx.candidates], **TOLERANCE)
    else:
        assert all(values[n][ctx.candidates[n]].sum() * 4 == pytest.approx(1.0, abs=1e-4) for n in range(2))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_statistics_of_rebuilt_tokens(family):
    """Every token has one: a dropped patch has the mean of its neighbours."""
    model, inputs = tiny.make(family, (2,))
    look = Look((EncoderRead("received", -2), EncoderRead("keys", -2)))
    for whole in (0, 2):
        reducer = vtoken.IPCV(keep=0.4, block=BLOCK, neighbours=NEIGHBOURS, stabilised=whole)
        with vtoken.reduce(model, vtoken.Chain([reducer, look])), torch.no_grad():
            model(**inputs)
            ctx = look.seen["ctx"]
        for values in ctx.encoder.values():
            assert values[ctx.candidates].isfinite().all()
        received = ctx.encoder[EncoderRead("received", -2)]
        assert (received.nan_to_num().sum(1) > 0).all()


@pytest.mark.parametrize("plan", ["enter", "return"])
@every_qwen
def test_gradients_reach_the_patch_embedding(family, plan):
    model, inputs = make(family, (1,))
    with vtoken.reduce(model, PLANS[plan]):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradient = model.model.visual.patch_embed.proj.weight.grad
    assert gradient.isfinite().all()
    assert gradient.any()


def test_a_last_token_that_was_dropped_comes_back():
    """A prompt that ends with a picture: the next token is read off the state of its last token."""
    model, inputs = tiny.make("qwen2_vl", (1,))
    inputs = page(inputs, flat=1.0)
    end = int((inputs["input_ids"] == tiny.IMAGE_ID).nonzero()[:, 1].max()) + 1
    inputs |= {name: inputs[name][:, :end] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    with vtoken.reduce(model, vtoken.PixelPrune(keep=4)), torch.no_grad():
        assert model(**inputs).logits[:, -1].isfinite().all()
        (image,) = vtoken.stats(model).images
        assert kept_tokens(model)[-1]
    assert image.kept == 4


def test_clips_have_a_budget_over_all_frames():
    model, inputs = tiny.make("qwen2_5_vl", (1, 1), video=True)
    for keep in (0.5, 2, 1):
        with vtoken.reduce(model, vtoken.PixelPrune(keep=keep)), torch.no_grad():
            model(**page(inputs))
            assert [clip.kept for clip in vtoken.stats(model).images] == [12 if keep == 0.5 else keep] * 2


def test_neighbours_of_a_clip_may_be_in_another_frame():
    model, inputs = tiny.make("qwen2_5_vl", (1,), video=True)
    with vtoken.reduce(model, RETURN), torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
        assert vtoken.stats(model).patches == (96, round(0.4 * 96))


# ---------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize("family", ["llava", "llava_onevision", "internvl", "mistral3"])
def test_towers_that_are_no_packed_sequence_are_refused(family):
    model, inputs = tiny.make(family, (1,))
    with vtoken.reduce(model, "pixelprune"), pytest.raises(ValueError, match="is not known to compute"):
        model(**inputs)


def test_rows_that_cannot_be_cut_are_refused():
    model, inputs = tiny.make("mistral3", (1,))
    with vtoken.reduce(model, RETURN), pytest.raises(ValueError, match="hands its blocks more than hidden states"):
        model(**inputs)


def test_the_first_block_has_changed_nothing():
    model, inputs = tiny.make("qwen2_vl", (1,))
    with (
        vtoken.reduce(model, vtoken.IPCV(block=0)),
        pytest.raises(ValueError, match=r"is its first: .* name one of 1 to 2"),
    ):
        model(**inputs)


def test_checkpointing_of_blocks_that_are_changed_inside():
    model, inputs = tiny.make("qwen2_vl", (1,))
    model.train()
    model.gradient_checkpointing_enable()
    with vtoken.reduce(model, RETURN), pytest.raises(NotImplementedError, match="stabilised=0"):
        model(**inputs)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("pixelprune", {"tau": 2}, r"tau=2: give a number in \[0, 1\]"),
        ("pixelprune", {"metric": "psnr"}, r"metric='psnr': choose one of \['max', 'mae', 'rmse'\]"),
        ("pixelprune", {"anchored": 1}, "anchored=1: give true or false"),
        ("pixelprune", {"keep": 0}, "keep=0"),
        ("pixelprune", {"std": 0.5}, "std=0.5: give image_std"),
        ("pixelprune", {"std": (0.5, 0)}, r"std=\(0.5, 0\)"),
        ("ipcv", {"keep": 1.5}, "keep=1.5"),
        ("ipcv", {"block": 1.5}, "block=1.5"),
        ("ipcv", {"neighbours": 0}, "neighbours=0"),
        ("ipcv", {"stabilised": -1}, "stabilised=-1"),
        ("ipcv", {"stabilised": 1.0}, "stabilised=1.0"),
    ],
)
def test_parameters_are_checked(name, fields, message):
    with pytest.raises(ValueError, match=message):
        vtoken.get_reducer(name, **fields)


def test_std_has_a_number_for_each_channel():
    model, inputs = make("qwen2_vl", (1,))
    with vtoken.reduce(model, vtoken.PixelPrune(std=(0.5, 0.5))), pytest.raises(ValueError, match="3 channels"):
        model(**inputs)


@pytest.mark.parametrize("bad", ["enter", "return"])
def test_numbers_that_are_not_finite_are_named(bad):
    model, inputs = make("qwen2_vl", (1,))
    inputs["pixel_values"] = inputs["pixel_values"].clone()
    inputs["pixel_values"][3] = float("nan")
    with vtoken.reduce(model, PLANS[bad]), pytest.raises(ValueError, match="not finite"):
        model(**inputs)


def test_only_the_first_stage_of_a_chain():
    with pytest.raises(ValueError, match="acts before the vision tower, which only the first stage"):
        vtoken.Chain([vtoken.DivPrune(keep=0.5), vtoken.PixelPrune()])
    with pytest.raises(ValueError, match="acts inside the vision tower, which only the first stage"):
        vtoken.Chain([vtoken.PixelPrune(), vtoken.IPCV()])
    assert vtoken.Chain([vtoken.IPCV(keep=0.3), vtoken.DivPrune(keep=0.5)]).stages == ("in_tower", "before_llm")
    assert vtoken.PixelPrune().stages == ("before_tower",)
