# SPDX-License-Identifier: Apache-2.0
"""Hand-made contexts: a left-padded batch, the maps of a vision tower, and decoder layers that only attend."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vtoken.context import NEWLINE, Attention, Cut, ItemLayout, VisualContext
from vtoken.encoder import EncoderRead
from vtoken.ops.ragged import compact, gather
from vtoken.reducers.base import Reducer
from vtoken.reducers.rows import question_rows

WIDTH, TOWER_WIDTH, HEADS, DEPTH = 16, 8, 3, 8


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------- items
def grid(rows: int, columns: int) -> ItemLayout:
    index = torch.arange(rows * columns)
    return ItemLayout(torch.zeros_like(index), index // columns, index % columns, ((rows, columns),))


def video(frames: int, rows: int, columns: int) -> ItemLayout:
    index = torch.arange(frames * rows * columns)
    place = index % (rows * columns)
    return ItemLayout(
        index // (rows * columns), place // columns, place % columns, ((rows, columns),) * frames, size=(96, 96)
    )


def anyres(side: int = 4, crops: tuple[int, int] = (2, 2), padding: int = 1) -> ItemLayout:
    """Thumbnail, then the mosaic of crops without ``padding`` rows above and below, a newline after each row."""
    tokens = [(0, r, c) for r in range(side) for c in range(side)]
    for row in range(padding, crops[0] * side - padding):
        for column in range(crops[1] * side):
            crop = (row // side) * crops[1] + column // side
            tokens.append((1 + crop, row % side, column % side))
        tokens.append((NEWLINE, 0, 0))
    view, row, column = torch.tensor(tokens).T
    return ItemLayout(
        view, row, column, ((side, side),) * (1 + crops[0] * crops[1]), thumbnail=0, crops=crops, size=(300, 400)
    )


LAYOUTS = {
    "grid": lambda: grid(6, 6),
    "small": lambda: grid(4, 5),
    "line": lambda: grid(1, 7),
    "one": lambda: grid(1, 1),
    "anyres": anyres,
    "wide": lambda: anyres(4, (1, 3), 0),
    "video": lambda: video(3, 3, 4),
}


class Tower(Mapping):
    """Any statistic of any block, the same for an item wherever it stands; NaN at newlines."""

    def __init__(self, items: list[tuple[int, ItemLayout]], has_cls: bool) -> None:
        self.items_, self.has_cls = items, has_cls

    def __getitem__(self, read: EncoderRead) -> Tensor:
        resolved = read.resolve(self.has_cls)
        code = zlib.crc32(repr((resolved.what, float(resolved.layer))).encode()) % 10_000
        maps = []
        for seed, layout in self.items_:
            tokens = len(layout.view)
            if resolved.what == "keys":
                found = random(seed * 31 + code, tokens, TOWER_WIDTH)
            else:
                found = 3 * random(seed * 31 + code, tokens)
                found = found if resolved.what == "cls_logits" else found.softmax(0)
            found[layout.newline] = float("nan")
            maps.append(found)
        return pad_sequence(maps, True, float("nan"))

    def __iter__(self) -> Iterator[EncoderRead]:
        return iter(())

    def __len__(self) -> int:
        return 0


# -------------------------------------------------------------------------------------------------------- batches
@dataclass(frozen=True)
class Row:
    """One row of the batch: kinds of its images, and a seed for all that is in it."""

    images: tuple[str, ...]
    seed: int


RAGGED = (Row(("grid",), 1), Row(("anyres", "small"), 2), Row((), 3), Row(("video", "one", "line"), 4))


def make_context(
    *rows: Row, newlines: str = "drop", has_cls: bool = True, same: bool = False, dtype: torch.dtype = torch.float32
) -> VisualContext:
    """A context before the language model; ``same`` makes all visual tokens identical."""
    items: list[tuple[int, ItemLayout]] = []
    parts: list[list[tuple[int, Tensor]]] = []
    for row in rows:
        part = [(-1, random(row.seed * 100, 3 + row.seed % 2, WIDTH))]
        for number, kind in enumerate(row.images):
            layout, seed = LAYOUTS[kind](), row.seed * 100 + number + 1
            features = torch.ones(len(layout.view), WIDTH) if same else random(seed, len(layout.view), WIDTH)
            part += [(len(items), features), (-1, random(seed + 50, 2, WIDTH))]
            items.append((seed, layout))
        part.append((-1, random(row.seed * 100 + 99, 4, WIDTH)))
        parts.append(part)
    length = max(sum(len(x) for _, x in part) for part in parts)
    hidden = torch.zeros(len(rows), length, WIDTH)
    item = torch.full((len(rows), length), -1)
    slot, text = item.clone(), torch.zeros(len(rows), length, dtype=torch.bool)
    for b, part in enumerate(parts):
        at = length - sum(len(x) for _, x in part)
        for number, x in part:
            span = slice(at, at + len(x))
            hidden[b, span], item[b, span] = x, number
            text[b, span] = number < 0
            if number >= 0:
                slot[b, span] = torch.arange(len(x))
            at += len(x)
    torch.manual_seed(0)
    projector = nn.Sequential(nn.Linear(TOWER_WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH)).to(dtype)
    before = [random(seed + 7, len(layout.view), TOWER_WIDTH) for seed, layout in items]
    return VisualContext(
        hidden=hidden.to(dtype),
        item=item,
        slot=slot,
        text=text,
        layouts=[layout for _, layout in items],
        encoder=Tower(items, has_cls),
        projector_input=pad_sequence(before, True, float("nan")).to(dtype),
        projector=projector,
        depth=DEPTH,
        newlines=newlines,
    )


# -------------------------------------------------------------------------------------------------- decoder layers
def attend(ctx: VisualContext, layer: int, what: str) -> Attention:
    """Causal attention rows of a layer with fixed random projections, on the present hidden states."""
    real = ctx.visual | ctx.text
    query, key = (
        (ctx.hidden.float() @ random(layer * 2 + n, WIDTH, HEADS * 6)).unflatten(2, (HEADS, 6)).transpose(1, 2)
        for n in (0, 1)
    )
    length = real.shape[1]
    seen = torch.ones(length, length).tril().bool() & real[:, None, None]
    probabilities = (query @ key.mT / 6).masked_fill(~seen, float("-inf")).softmax(-1)
    probabilities = probabilities.masked_fill(~seen.any(-1, keepdim=True), 0.0)  # padding sees nothing
    if what == "last":
        last = length - 1 - ctx.text.flip(1).to(torch.int8).argmax(1, keepdim=True)
        index, valid = last, torch.ones_like(last, dtype=torch.bool)
    elif what == "question":
        index, valid = question_rows(ctx)
    else:
        index, valid = compact({"text": ctx.text, "all": real}[what])
    values = (ctx.hidden.float() @ random(layer * 2 + 1000, WIDTH, HEADS * 6)).unflatten(2, (HEADS, 6)).transpose(1, 2)
    return Attention(gather(probabilities, index, dim=2), valid, values, key)


def run(reducer: Reducer, ctx: VisualContext) -> list[VisualContext]:
    """The context after every cut, beginning with the untouched one."""
    steps = [ctx]
    before = reducer.before_llm(ctx)
    if before is not None:
        check_cut(before, ctx)
        ctx = ctx.after(before)
        steps.append(ctx)
    layers, taps = reducer.layers(DEPTH), reducer.taps(DEPTH)
    for layer in range(DEPTH):
        if layer in layers:
            now = ctx
            ctx = replace(
                ctx,
                layer=layer,
                peek=lambda what, layer=layer, now=now: attend(now, layer, what),
                rerun=lambda keep, now=now: now.hidden,
            )
            cut = reducer.at_layer(layer, ctx)
            if cut is not None:
                check_cut(cut, ctx)
                ctx = ctx.after(cut)
                steps.append(ctx)
        if layer in taps:
            ctx = replace(ctx, attention={**ctx.attention, layer: attend(ctx, layer, taps[layer])})
    return steps


def check_cut(cut: Cut, ctx: VisualContext) -> None:
    """Shapes, and nothing comes back that was gone."""
    assert cut.keep.dtype == torch.bool
    assert cut.keep.shape == ctx.valid.shape
    assert not (cut.keep & ~ctx.valid).any()
    if cut.features is not None:
        assert cut.features.shape == ctx.features.shape
        assert cut.features.dtype == ctx.hidden.dtype
        assert cut.features[cut.keep].isfinite().all()
    if cut.source is not None:
        slots = torch.arange(ctx.longest).expand(cut.keep.shape)
        assert torch.equal(cut.source == slots, cut.keep)
        used = cut.source >= 0
        assert cut.keep.gather(1, cut.source.clamp(min=0))[used].all()
