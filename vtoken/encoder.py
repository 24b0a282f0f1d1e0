# SPDX-License-Identifier: Apache-2.0
"""What a reducer may read from one layer of the vision tower: [CLS] rows, received attention, keys.

Each statistic is a function ``(query, key, scale, first) -> (views, tokens)`` or ``(views, tokens, C)``; ``first`` is
the index of the first patch (1 if the tower has a [CLS] token). Means are over the patches as queries; what comes out
is for all tokens, because models may show their language model the [CLS] token as well. Queries and keys are multiplied
in their own dtype, as the tower does; softmax and sums are float32. Attention of all patches is streamed: `BLOCK` of it
exists at a time. Pictures that a mask separates in one sequence are read one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtoken.precision import without_autocast

BLOCK = 1 << 22
"""Attention weights that exist at a time: 16 MiB of logits and 16 MiB of probabilities in float32."""


@dataclass(frozen=True)
class EncoderRead:
    """A request for one statistic of one tower layer.

    Parameters
    ----------
    what : str
        ``"cls"``: softmaxed attention of [CLS], mean over heads; ``"cls_logits"``: the same before the softmax;
        ``"received"``: attention a patch receives, mean over heads and patch queries; ``"given"``: mean over the
        patches of the attention a patch gives to them, mean over heads, which is the same for all patches where there
        is no [CLS]; ``"keys"``: keys, mean over heads; ``"best"``: ``"cls"`` where the tower has a [CLS] token, else
        ``"received"``. Where the model shows [CLS] or registers as visual tokens, they have values of their own.
    layer : int or float
        Index into the tower's blocks; -2 is the block whose output LLaVA uses. A float in (0, 1) is a share of the
        tower's depth: block ``int(share * blocks)``. Where some blocks attend in windows (Qwen2.5-VL), a negative
        index or a share means the nearest block at or before it that attends to the whole picture (or the first one
        if there is none before), and the number of a windowed block is refused: see `Adapter.read_block`.
    """

    what: str = "best"
    layer: int | float = -2

    def __post_init__(self) -> None:
        if self.what != "best" and self.what not in STATISTICS:
            raise ValueError(f"EncoderRead(what={self.what!r}): choose one of {['best', *STATISTICS]}.")

    def resolve(self, has_cls: bool) -> EncoderRead:
        """Replace "best" by what the tower offers."""
        if self.what == "best":
            return EncoderRead("cls" if has_cls else "received", self.layer)
        if self.what in NEEDS_CLS and not has_cls:
            raise ValueError(
                f"The vision tower has no [CLS] token, so {self.what!r} attention does not exist: "
                "use a reducer that reads received attention, or its no-[CLS] variant."
            )
        return self


def _cls_logits(query: Tensor, key: Tensor, scale: float, first: int) -> Tensor:
    return ((query[:, :, :1] * scale) @ key.mT)[:, :, 0].mean(1, dtype=torch.float32)


def _cls(query: Tensor, key: Tensor, scale: float, first: int) -> Tensor:
    rows = ((query[:, :, :1] * scale) @ key.mT).softmax(-1, dtype=torch.float32)
    return rows[:, :, 0].mean(1)


def _received(query: Tensor, key: Tensor, scale: float, first: int) -> Tensor:
    views, heads, tokens, _ = query.shape
    total = torch.zeros(views, tokens, dtype=torch.float32, device=query.device)
    for some, _, rows in _rows(query[:, :, first:], key, scale):
        flat = rows.flatten(1, 2)
        total[some] += (flat.new_ones(len(flat), 1, flat.shape[1]) @ flat)[:, 0]  # faster than a sum over rows
    return total / (heads * (tokens - first))


def _given(query: Tensor, key: Tensor, scale: float, first: int) -> Tensor:
    views, heads, tokens, _ = query.shape
    left = torch.zeros(views, tokens, dtype=torch.float32, device=query.device)  # what goes to [CLS]: rows add up to 1
    if first:
        for some, span, rows in _rows(query, key, scale):
            left[some, span] += rows[..., :first].sum(-1).sum(1)
    return (1 - left / heads) / (tokens - first)


def _keys(query: Tensor, key: Tensor, scale: float, first: int) -> Tensor:
    return key.mean(1, dtype=torch.float32)


def _rows(query: Tensor, key: Tensor, scale: float) -> Iterator[tuple[slice, slice, Tensor]]:
    """Attention of Q queries, block by block: views, queries and their rows (views, heads, queries, N) in float32.

    A block is some rows of one head, or all rows of some heads of one view, or some whole views.
    """
    views, heads, queries, _ = query.shape
    tokens = key.shape[2]
    height = min(queries, max(1, BLOCK // tokens))
    width = min(heads, max(1, BLOCK // (height * tokens)))
    depth = min(views, max(1, BLOCK // (heads * height * tokens)))
    for view in range(0, views, depth):
        some = slice(view, view + depth)
        for head in range(0, heads, width):
            keys = key[some, head : head + width].mT
            scaled = query[some, head : head + width] * scale
            for row in range(0, queries, height):
                span = slice(row, row + height)
                yield some, span, (scaled[:, :, span] @ keys).softmax(-1, dtype=torch.float32)


STATISTICS: dict[str, Callable[[Tensor, Tensor, float, int], Tensor]] = {
    "cls": _cls,
    "cls_logits": _cls_logits,
    "received": _received,
    "given": _given,
    "keys": _keys,
}
NEEDS_CLS = ("cls", "cls_logits")


def statistic(what: str, query: Tensor, key: Tensor, scale: float, first: int) -> Tensor:
    """One of `STATISTICS`, of queries and keys (views, heads, N, d); autocast does not round it."""
    with without_autocast(query.device):
        return STATISTICS[what](query, key, scale, first)


class TowerCall(NamedTuple):
    """One call of the attention of a block: ``query`` and ``key`` (views, heads, tokens, d), and ``scale``.

    ``pictures`` are (view, start, end) of the runs of tokens that see each other and nothing else, where the tower
    separates them; None if all tokens of a view see each other.
    """

    query: Tensor
    key: Tensor
    scale: float
    pictures: tuple[tuple[int, int, int], ...] | None = None


def separated(mask: Tensor | None, bounds: Tensor | None, views: int, tokens: int) -> tuple | None:
    """The `TowerCall.pictures` of a call.

    Parameters
    ----------
    mask : Tensor or None
        What the tower gave its attention: (views or 1, 1, tokens or 1, tokens), bool or additive, or the padding mask
        (views, tokens) of flash attention.
    bounds : Tensor or None
        (P + 1,) long: where pictures begin in a packed sequence, as flash attention is told.

    Raises
    ------
    ValueError
        If the mask does more than to separate pictures and padding.
    """
    if mask is None:
        starts = [] if bounds is None else bounds.tolist()
        return tuple((0, *span) for span in itertools.pairwise(starts)) or None
    seen = mask[:, None, None] if mask.dim() == 2 else mask
    if seen.is_floating_point():
        plain = bool(((seen == 0) | (seen <= torch.finfo(seen.dtype).min / 2)).all())
        seen = seen == 0
    else:
        plain, seen = True, seen.bool()
    rows = seen[:, 0].expand(views, tokens, tokens)
    count, first = rows.sum(-1), rows.to(torch.uint8).argmax(-1)
    place = torch.arange(tokens, device=rows.device)
    begins, ends = first[..., None], (first + count)[..., None]
    unbroken = (rows == (place >= begins) & (place < ends)).all()
    inside = (place >= first) & (place < first + count)  # a row of padding sees others but is seen by none
    head = inside & (place == first)
    agree = (first.gather(1, first) == first) & (count.gather(1, first) == count) | (count == 0)
    apart = unbroken & agree.all() & (count[head].sum() == inside.sum())
    if not plain or seen.shape[1] != 1 or not bool(apart):
        raise ValueError(
            "The vision tower masks its attention by more than the borders of pictures and padding, and its statistics "
            "are defined within a picture: use a reducer that needs no encoder attention."
        )
    return tuple((view, start, start + int(count[view, start])) for view, start in head.nonzero().tolist())


def read_calls(what: str, calls: Sequence[TowerCall], first: int) -> list[Tensor]:
    """One statistic of many calls of a layer: windows, frames and pictures of one size are computed together.

    Parameters
    ----------
    what : str
        A resolved name, a key of `STATISTICS`.
    calls : sequence of TowerCall
        In the order of the tower.
    first : int
        Index of the first patch.

    Returns
    -------
    list of Tensor
        (views, tokens) or (views, tokens, C), one per call; NaN for padding.
    """
    parts: list[tuple[Tensor, Tensor, float]] = []
    for call in calls:
        if call.pictures is None:
            parts.append(call[:3])
        for view, start, end in call.pictures or ():
            query, key = (x[view : view + 1, :, start:end] for x in call[:2])
            parts.append((query, key, call.scale))
    found = iter(_read_parts(what, parts, first))
    return [next(found) if call.pictures is None else _rejoined(call, found) for call in calls]


def _rejoined(call: TowerCall, found: Iterator[Tensor]) -> Tensor:
    out: Any = None
    for view, start, end in call.pictures or ():
        values = next(found)[0]
        if out is None:
            out = values.new_full((len(call.query), call.query.shape[2], *values.shape[1:]), float("nan"))
        out[view, start:end] = values
    return out


def _read_parts(what: str, parts: Sequence[tuple[Tensor, Tensor, float]], first: int) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    alike: dict[tuple, list[int]] = {}
    for number, (query, _, scale) in enumerate(parts):
        alike.setdefault((query.shape[1:], scale), []).append(number)
    for (_, scale), numbers in alike.items():
        query = torch.cat([parts[n][0] for n in numbers])
        key = torch.cat([parts[n][1] for n in numbers])
        values = statistic(what, query, key, scale, first).split([len(parts[n][0]) for n in numbers])
        found.update(zip(numbers, values, strict=True))
    return [found[number] for number in range(len(parts))]
