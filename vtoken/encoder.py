# SPDX-License-Identifier: Apache-2.0
"""What a reducer may read from one layer of the vision tower: [CLS] rows, received attention, keys.

Each statistic is a function ``(query, key, scale, first) -> (views, patches)`` or ``(views, patches, C)``; ``first`` is
the index of the first patch (1 if the tower has a [CLS] token). Queries and keys are multiplied in their own dtype, as
the tower does; softmax and sums are float32. Attention of all patches is streamed: `BLOCK` of it exists at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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
        ``"cls"``: softmaxed attention of [CLS], mean over heads, [CLS] column dropped; ``"cls_logits"``: the same
        before the softmax; ``"received"``: attention a patch receives, mean over heads and patch queries;
        ``"given"``: mean over the patches of the attention a patch gives to them, mean over heads, which is the same
        for all patches where there is no [CLS]; ``"keys"``: keys, mean over heads; ``"best"``: ``"cls"`` where the
        tower has a [CLS] token, else ``"received"``.
    layer : int or float
        Index into the tower's blocks; -2 is the block whose output LLaVA uses. A float in (0, 1) is a share of the
        tower's depth: block ``int(share * blocks)``.
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
    return ((query[:, :, :1] * scale) @ key.mT)[:, :, 0, first:].mean(1, dtype=torch.float32)


def _cls(query: Tensor, key: Tensor, scale: float, first: int) -> Tensor:
    rows = ((query[:, :, :1] * scale) @ key.mT).softmax(-1, dtype=torch.float32)
    return rows[:, :, 0, first:].mean(1)


def _received(query: Tensor, key: Tensor, scale: float, first: int) -> Tensor:
    views, heads, tokens, _ = query.shape
    total = torch.zeros(views, tokens, dtype=torch.float32, device=query.device)
    for some, _, rows in _patch_rows(query, key, scale, first):
        flat = rows.flatten(1, 2)
        total[some] += (flat.new_ones(len(flat), 1, flat.shape[1]) @ flat)[:, 0]  # faster than a sum over rows
    return total[:, first:] / (heads * (tokens - first))


def _given(query: Tensor, key: Tensor, scale: float, first: int) -> Tensor:
    views, heads, tokens, _ = query.shape
    patches = tokens - first
    left = torch.zeros(views, patches, dtype=torch.float32, device=query.device)  # what goes to [CLS]: rows add up to 1
    if first:
        for some, span, rows in _patch_rows(query, key, scale, first):
            left[some, span] += rows[..., :first].sum(-1).sum(1)
    return (1 - left / heads) / patches


def _keys(query: Tensor, key: Tensor, scale: float, first: int) -> Tensor:
    return key[:, :, first:].mean(1, dtype=torch.float32)


def _patch_rows(query: Tensor, key: Tensor, scale: float, first: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Attention of the patches, block by block: views, patches and their rows (views, heads, patches, N) in float32.

    A block is some rows of one head, or all rows of some heads of one view, or some whole views.
    """
    views, heads, tokens, _ = query.shape
    height = min(tokens - first, max(1, BLOCK // tokens))
    width = min(heads, max(1, BLOCK // (height * tokens)))
    depth = min(views, max(1, BLOCK // (heads * height * tokens)))
    for view in range(0, views, depth):
        some = slice(view, view + depth)
        for head in range(0, heads, width):
            keys = key[some, head : head + width].mT
            scaled = query[some, head : head + width, first:] * scale
            for row in range(0, tokens - first, height):
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


def read_calls(what: str, calls: Sequence[tuple[Tensor, Tensor, float]], first: int) -> list[Tensor]:
    """One statistic of many calls of a layer: windows and frames of one size are computed together.

    Parameters
    ----------
    what : str
        A resolved name, a key of `STATISTICS`.
    calls : sequence of (query, key, scale)
        (views, heads, patches, d) each.
    first : int
        Index of the first patch.

    Returns
    -------
    list of Tensor
        One per call.
    """
    found: dict[int, Tensor] = {}
    alike: dict[tuple, list[int]] = {}
    for number, (query, _, scale) in enumerate(calls):
        alike.setdefault((query.shape[1:], scale), []).append(number)
    for (_, scale), numbers in alike.items():
        query = torch.cat([calls[n][0] for n in numbers])
        key = torch.cat([calls[n][1] for n in numbers])
        parts = statistic(what, query, key, scale, first).split([len(calls[n][0]) for n in numbers])
        found.update(zip(numbers, parts, strict=True))
    return [found[number] for number in range(len(calls))]
