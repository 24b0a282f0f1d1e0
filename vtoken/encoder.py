# SPDX-License-Identifier: Apache-2.0
"""What a reducer may read from one layer of the vision tower: [CLS] rows, received attention, keys.

Each statistic is a function ``(query, key, scale, first) -> (views, patches)`` or ``(views, patches, C)``; ``first`` is
the index of the first patch (1 if the tower has a [CLS] token). Nothing of size patches x patches is kept in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 512  # query rows at a time


@dataclass(frozen=True)
class EncoderRead:
    """A request for one statistic of one tower layer.

    Parameters
    ----------
    what : str
        ``"cls"``: softmaxed attention of [CLS], mean over heads, [CLS] column dropped; ``"cls_logits"``: the same
        before the softmax; ``"received"``: attention a patch receives, mean over heads and patch queries;
        ``"given"``: mean over the patches of the attention a patch gives to them, mean over heads; ``"keys"``: keys,
        mean over heads; ``"best"``: ``"cls"`` where the tower has a [CLS] token, else ``"received"``.
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
    return ((query[:, :, :1].float() @ key.float().mT) * scale)[:, :, 0, first:].mean(1)


def _cls(query: Tensor, key: Tensor, scale: float, first: int) -> Tensor:
    return ((query[:, :, :1].float() @ key.float().mT) * scale).softmax(-1)[:, :, 0, first:].mean(1)


def _received(query: Tensor, key: Tensor, scale: float, first: int) -> Tensor:
    keys = key.float().mT
    total = torch.zeros((), device=query.device)
    for rows in query[:, :, first:].split(CHUNK, 2):
        total = total + ((rows.float() @ keys) * scale).softmax(-1)[..., first:].sum((1, 2))
    return total / (query.shape[1] * (query.shape[2] - first))


def _given(query: Tensor, key: Tensor, scale: float, first: int) -> Tensor:
    keys = key.float().mT
    rows = [
        ((part.float() @ keys) * scale).softmax(-1)[..., first:].mean(-1).mean(1)
        for part in query[:, :, first:].split(CHUNK, 2)
    ]
    return torch.cat(rows, 1)


def _keys(query: Tensor, key: Tensor, scale: float, first: int) -> Tensor:
    return key[:, :, first:].float().mean(1)


STATISTICS: dict[str, Callable[[Tensor, Tensor, float, int], Tensor]] = {
    "cls": _cls,
    "cls_logits": _cls_logits,
    "received": _received,
    "given": _given,
    "keys": _keys,
}
NEEDS_CLS = ("cls", "cls_logits")
