# SPDX-License-Identifier: Apache-2.0
"""The sequence that a group of decoder layers works on: a value, from which a cut makes the next one.

This file must not know masks, caches or hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vtoken.context import Cut
from vtoken.engine.prompt import Prompt, View
from vtoken.ops.ragged import gather, spread


@dataclass(frozen=True, eq=False)
class Group:
    """The sequence that layers from ``start`` on work on.

    Parameters
    ----------
    index : Tensor
        (B, n) long: the kept tokens, as positions in the call's S tokens.
    relative : Tensor
        (B, n) long: the same as positions in the first group, the sequence that the language model was given.
    valid : Tensor
        (B, n) bool: False on padding (and, with the mask backend, on hidden tokens).
    item, slot : Tensor
        (B, n) long: which token of which item stands there, -1 elsewhere.
    text : Tensor
        (B, n) bool: real tokens that are no placeholder; they always stay.
    view : View
        The prompts in this sequence.
    worth : Tensor or None
        (B, n) float: log of how many tokens each one stands for, where that is repaired; 0 for text and padding.
    """

    start: int
    index: Tensor
    relative: Tensor
    valid: Tensor
    item: Tensor
    slot: Tensor
    text: Tensor
    view: View
    worth: Tensor | None = None

    @classmethod
    def whole(cls, prompt: Prompt) -> Group:
        """The sequence that the caller passed."""
        real, placed = prompt.real, prompt.placed
        everything = torch.arange(real.shape[1], device=real.device).expand(real.shape)
        view = prompt.view(everything, real)
        return cls(0, everything, everything, real, placed.item, placed.slot, placed.text, view)

    def to(self, device: torch.device) -> Group:
        """The same on the device of a layer, of a model whose layers live on several."""
        if self.index.device == device:
            return self
        names = ("index", "relative", "valid", "item", "slot", "text")
        row, index = (None if x is None else x.to(device) for x in (self.view.row, self.view.index))
        view, worth = (
            View(row, index, self.view.valid.to(device)),
            None if self.worth is None else self.worth.to(device),
        )
        return replace(self, view=view, worth=worth, **{name: getattr(self, name).to(device) for name in names})

    def weighing(self, counts: Tensor | None) -> Group:
        """The same, whose tokens stand for so many (I, N)."""
        if counts is None:
            return self
        return replace(self, worth=spread(counts.clamp(min=1).log().to(self.item.device), self.item, self.slot))

    @property
    def visual(self) -> Tensor:
        """(B, n) bool."""
        return self.item >= 0

    @property
    def shown(self) -> tuple[Tensor, Tensor, Tensor]:
        """``item``, ``slot`` and ``text`` of the prompts, (P, m) each."""
        view = self.view
        item, slot, text = (view.take(x) for x in (self.item, self.slot, self.text & self.valid))
        if view.index is None:
            return item, slot, text
        return item.masked_fill(~view.valid, -1), slot.masked_fill(~view.valid, -1), text & view.valid

    def stays(self, keep: Tensor) -> Tensor:
        """(B, n) bool: what is left of the sequence when ``keep`` (I, N) is left of the items."""
        return (spread(keep.to(self.item.device), self.item, self.slot, False) | self.text) & self.valid

    def rewritten(self, hidden: Tensor, cut: Cut) -> Tensor:
        """(B, n, D): the states with the features that the cut gives to the tokens it keeps."""
        if cut.features is None:
            return hidden
        stays = spread(cut.keep, self.item, self.slot, False)
        return torch.where(stays[..., None], spread(cut.features.to(hidden.dtype), self.item, self.slot), hidden)

    def taken(self, start: int, index: Tensor, valid: Tensor, prompt: Prompt, first: bool = False) -> Group:
        """The sequence of the tokens ``index`` (B, n) of this one, ``valid`` (B, n)."""
        gone = ~valid
        item, slot = (gather(x, index).masked_fill(gone, -1) for x in (self.item, self.slot))
        text, whole = gather(self.text, index) & valid, gather(self.index, index)
        relative = gather(self.relative, index)
        if first:
            relative = torch.arange(index.shape[1], device=index.device).expand(index.shape)
        return Group(start, whole, relative, valid, item, slot, text, prompt.view(whole, valid))

    def hiding(self, start: int, keep: Tensor, prompt: Prompt) -> Group:
        """The same sequence in which only ``keep`` (B, n) is visible."""
        item, slot = (torch.where(keep, x, -1) for x in (self.item, self.slot))
        return Group(start, self.index, self.relative, keep, item, slot, self.text, prompt.view(self.index, keep))


def rows_left(value: Any, groups: Sequence[Group]) -> Any:
    """An argument of a decoder layer for the last of several groups, which has dropped tokens of the first.

    A tensor with a row per token, (B or 1, S, ...), is shortened, also inside of a tuple; anything else stays.
    """
    rows, length = groups[0].index.shape
    if len(groups) == 1:
        return value
    if isinstance(value, tuple | list):
        return type(value)(rows_left(part, groups) for part in value)
    if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[0] not in (1, rows) or value.shape[1] != length:
        return value
    short = gather(value, groups[-1].relative)
    return short & groups[-1].valid.to(short.device) if value.dtype == torch.bool and value.dim() == 2 else short
