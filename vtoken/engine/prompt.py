# SPDX-License-Identifier: Apache-2.0
"""Whose token is what: documents of a packed row, text and pictures of a prompt, and what stands behind a prompt.

A reducer must choose by the prompt alone. So what it is shown (`Prompt.context`) is the prompt of each document as a
row of its own: no padding that the row carries for others, no other document, and no draft, generated or supervised
token. This file must not know masks, caches or layers.

Shapes: B rows of S new tokens, P documents, I items of up to N tokens.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtoken.adapters.base import MODALITIES
from vtoken.context import ItemTable, VisualContext
from vtoken.encoder import EncoderRead
from vtoken.engine.tower import VisionRecord, expand_items
from vtoken.ops.ragged import compact, gather

if TYPE_CHECKING:
    from vtoken.adapters.base import Adapter

IGNORED = -100
"""Label of a token that is not supervised."""


# ------------------------------------------------------------------------------------------------------------- placing
@dataclass(frozen=True, eq=False)
class Placed:
    """Where the tokens of the items stand in a batch, and what the vision side knows of them.

    Parameters
    ----------
    item, slot : Tensor
        (B, S) long: which token of which item stands at each place; -1 elsewhere, at placeholders that the caller's
        mask hides and at those whose patches the tower dropped.
    text : Tensor
        (B, S) bool: real tokens that are no placeholder of an item.
    row : Tensor
        (I,) long: batch row of each item.
    dropped : tuple of Tensor or None
        ``item`` and ``slot`` of the placeholders whose patches the tower dropped, None if it dropped none.
    simple : bool
        Whether rows are padded on the left only, nothing is hidden and no row ends with a picture.
    table : ItemTable
        The items.
    encoder, projector_input, resampled
        See `VisualContext`.
    """

    item: Tensor
    slot: Tensor
    text: Tensor
    row: Tensor
    dropped: tuple[Tensor, Tensor] | None
    simple: bool
    table: ItemTable
    encoder: Mapping[EncoderRead, Tensor]
    projector_input: Tensor | None
    resampled: Sequence[Tensor]

    @property
    def valid(self) -> Tensor:
        """(I, N) bool: tokens that are there."""
        here = self.item >= 0
        valid = torch.zeros(self.table.view.shape, dtype=torch.bool, device=here.device)
        valid[self.item[here], self.slot[here]] = True
        return valid


def place(
    adapter: Adapter,
    kinds: Tensor,
    records: Mapping[str, VisionRecord],
    real: Tensor,
    reads: Sequence[EncoderRead] = (),
) -> Placed:
    """Give every placeholder the item and the slot that its feature comes from.

    Placeholders that the caller's mask hides have their features too, but are not there.

    Parameters
    ----------
    kinds : Tensor
        (B, S) long: modality of each placeholder, 0 for text.
    records : mapping of str to VisionRecord
        Encoded items by modality; a placeholder of another modality is text.
    real : Tensor
        (B, S) bool: tokens that are there.
    reads : sequence of EncoderRead
        Statistics that are wanted.
    """
    device, kinds = real.device, _encoded_kinds(kinds.to(real.device), records)
    item, slot = (torch.full(kinds.shape, -1, device=device) for _ in range(2))
    dropped, rows = torch.zeros_like(real), list[int]()
    found = _Found({read: [] for read in reads})
    for modality, code in MODALITIES.items():
        here = kinds == code
        if (record := records.get(modality)) is None or not any(counts := here.sum(1).tolist()):
            continue
        times = max(sum(counts) // max(sum(record.lengths), 1), 1)  # beams repeat every row in a block
        record = adapter.regroup(record, here[::times])
        order = expand_items(record.lengths, counts)
        lengths, places = [record.lengths[i] for i in order], here.nonzero(as_tuple=True)
        item[places], slot[places] = (x.to(device) for x in _numbered(len(found.layouts), lengths))
        found.add(record, order, device)
        rows += _rows(lengths, counts)
        if record.dropped is not None:
            dropped[places] = torch.cat(_items(record.dropped, record, order, device))
    shown, gone, hidden = None, None, (kinds > 0) & ~real
    simple = _is_simple(kinds, real, hidden)
    if not simple and bool(hidden.any()):  # a picture, or a part of one, that the caller's mask hides
        whole = torch.tensor([len(layout.view) for layout in found.layouts], device=device)
        shown = whole - torch.bincount(item[hidden & (item >= 0)], minlength=len(whole))
        item, slot = (x.masked_fill(hidden, -1) for x in (item, slot))
    if any(record.dropped is not None for record in records.values()):
        gone = item.masked_fill(~dropped, -1), slot.masked_fill(~dropped, -1)
        item, slot = (x.masked_fill(dropped, -1) for x in (item, slot))
    row, table = torch.tensor(rows, device=device), ItemTable.of(found.layouts, device, shown)
    return Placed(item, slot, real & (kinds == 0), row, gone, simple, table, *found.padded())


def _is_simple(kinds: Tensor, real: Tensor, hidden: Tensor) -> bool:
    """`Placed.simple`: one look at the device for three questions that nearly always have the same answer."""
    right_padding = (real[:, :-1] & ~real[:, 1:]).any()
    return not bool((kinds[:, -1:] > 0).any() | hidden.any() | right_padding)


def _encoded_kinds(kinds: Tensor, records: Mapping[str, VisionRecord]) -> Tensor:
    """``kinds`` (B, S) in which a placeholder that no picture belongs to is text."""
    for modality, code in MODALITIES.items():
        if modality not in records:
            kinds = kinds.masked_fill(kinds == code, 0)
    return kinds


@dataclass
class _Found:
    """What records know of the items, collected in the order of the batch."""

    maps: dict[EncoderRead, list[Tensor]]
    layouts: list[Any] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    resampled: list[Tensor] = field(default_factory=list)

    def add(self, record: VisionRecord, order: list[int], device: torch.device) -> None:
        self.layouts += [record.layouts[i] for i in order]
        for read in self.maps:
            if read in record.maps:
                self.maps[read] += _items(record.maps[read], record, order, device)
        if record.projector_input is not None:
            self.inputs += _items(record.projector_input, record, order, device)
        self.resampled += [record.resampled[i].to(device) for i in order] if record.resampled else []

    def padded(self) -> tuple[dict[EncoderRead, Tensor], Tensor | None, list[Tensor]]:
        nan = float("nan")
        maps = {read: pad_sequence(parts, True, nan) for read, parts in self.maps.items() if parts}
        return maps, pad_sequence(self.inputs, True, nan) if self.inputs else None, self.resampled


def _numbered(first: int, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """(T,) long each, per token of items with such lengths: its item, counted from ``first``, and its place in it."""
    items = torch.arange(first, first + len(lengths), device="cpu")
    places = torch.cat([torch.arange(length, device="cpu") for length in lengths])
    return items.repeat_interleave(torch.tensor(lengths, device="cpu")), places


def _rows(lengths: list[int], counts: list[int]) -> list[int]:
    """Batch row of each item of such ``lengths``, of rows with ``counts`` placeholders."""
    rows, row, left = [], 0, counts[0]
    for length in lengths:
        while not left:
            row, left = row + 1, counts[row + 1]
        rows.append(row)
        left -= length
    return rows


def _items(values: Tensor, record: VisionRecord, order: list[int], device: torch.device) -> list[Tensor]:
    """What a record holds per token (T, ...), item by item in the ``order`` of the prompt."""
    parts = values.split(record.lengths)
    return [parts[i].to(device) for i in order]


# ------------------------------------------------------------------------------------------------ what reducers see
@dataclass(frozen=True, eq=False)
class View:
    """The prompts of a batch, each as a left-padded row of its own, seen in a sequence (B, n).

    Parameters
    ----------
    row : Tensor or None
        (P,) long: batch row of each document; None where documents are the rows themselves and fill them.
    index : Tensor or None
        (P, m) long: where the tokens of each prompt stand in its row.
    valid : Tensor
        (P, m) bool.
    """

    row: Tensor | None
    index: Tensor | None
    valid: Tensor

    def take(self, x: Tensor) -> Tensor:
        """A per-token tensor (B, n, ...) of the prompts: (P, m, ...)."""
        if self.index is None:
            return x
        return gather(self.rows(x), self.index)

    def rows(self, x: Tensor) -> Tensor:
        """A tensor (B, ...) that belongs to whole rows, for each document: (P, ...)."""
        if self.row is None:
            return x
        if x.shape[0] == 1:
            return x.expand(len(self.row), *x.shape[1:])
        return x.index_select(0, self.row.to(x.device))

    def places(self, rows: Tensor) -> Tensor:
        """Places (P, R) in the prompts, as places in their batch rows."""
        return rows if self.index is None else self.index.gather(1, rows.to(self.index.device))


@dataclass(frozen=True, eq=False)
class Prompt:
    """The prompts that a pass brings, and the tokens that stand behind them.

    Parameters
    ----------
    placed : Placed
        Items and text of the whole rows.
    real : Tensor
        (B, S) bool.
    document : Tensor or None
        (B, S) long from 0: document of each token in its row; None where every row is one.
    behind : Tensor or None
        (B, S) bool: draft, generated and supervised tokens; None where there are none.
    plain : bool
        Whether every row is one prompt behind its padding, so that prompts and rows are the same.
    row, number : Tensor or None
        (P,) long: batch row of each document and its number there, where a row packs several.
    """

    placed: Placed
    real: Tensor
    document: Tensor | None
    behind: Tensor | None
    plain: bool
    row: Tensor | None
    number: Tensor | None

    @classmethod
    def of(cls, placed: Placed, real: Tensor, document: Tensor | None, behind: Tensor | None) -> Prompt:
        """Find out what a pass brings."""
        plain = document is None and behind is None
        if plain and not placed.simple:
            plain = not bool((real[:, :-1] & ~real[:, 1:]).any())
        row = number = None
        if document is not None:
            counts = torch.where(real, document, 0).amax(1) + 1
            row = torch.arange(len(real), device=real.device).repeat_interleave(counts)
            number = torch.cat([torch.arange(count, device=real.device) for count in counts.tolist()])
        found = cls(placed, real, document, behind, plain, row, number)
        return found if placed.dropped is None else found._with_last_tokens()

    def documents_of(self, index: Tensor) -> Tensor | None:
        """(B, n): document of each of the tokens ``index`` (B, n), None where rows are not packed."""
        return None if self.document is None else gather(self.document.to(index.device), index)

    def _with_last_tokens(self) -> Prompt:
        """A last token whose patches the tower dropped comes back: the next token is read off its state.

        The token of its item that stands nearest before it goes in its place, so that the budget holds.
        """
        placed = self.placed
        assert placed.dropped is not None
        index = torch.arange(self.real.shape[1], device=self.real.device).expand(self.real.shape)
        view = self.view(index, self.real)
        rows = torch.arange(len(self.real), device=index.device) if view.row is None else view.row
        last = view.places(torch.full((len(rows), 1), view.valid.shape[1] - 1, device=index.device))[:, 0]
        gone = placed.dropped[0][rows, last] >= 0
        item, slot = placed.item.clone(), placed.slot.clone()
        for row, place in zip(rows[gone].tolist(), last[gone].tolist(), strict=True):  # prompts that end with pictures
            item[row, place], slot[row, place] = placed.dropped[0][row, place], placed.dropped[1][row, place]
            others = (item[row, :place] == item[row, place]).nonzero()
            if len(others):
                item[row, others[-1]] = slot[row, others[-1]] = -1
        return replace(self, placed=replace(placed, item=item, slot=slot))

    def view(self, index: Tensor, valid: Tensor) -> View:
        """The prompts in the sequence that is left: tokens ``index`` (B, n), ``valid`` (B, n)."""
        if self.plain:
            return View(None, None, valid)
        inside = valid if self.behind is None else valid & ~self.behind.gather(1, index)
        if self.document is not None:
            assert self.row is not None
            assert self.number is not None
            own = self.document.gather(1, index)[self.row] == self.number[:, None]
            inside = own & inside[self.row]
        place, there = compact(inside)
        return View(self.row, place, there)

    def context(self, hidden: Tensor, view: View, adapter: Adapter, newlines: str) -> VisualContext:
        """What a reducer sees before the language model of the embeddings (B, S, D)."""
        placed = self.placed
        there = view.valid
        item, slot, text = (view.take(x) for x in (placed.item, placed.slot, placed.text))
        if view.index is not None:
            item, slot, text = item.masked_fill(~there, -1), slot.masked_fill(~there, -1), text & there
        return VisualContext(
            hidden=view.take(hidden),
            item=item,
            slot=slot,
            text=text,
            layouts=placed.table.layouts,
            encoder=placed.encoder,
            projector_input=placed.projector_input,
            projector=adapter.token_projector if placed.projector_input is not None else None,
            resampled=placed.resampled,
            depth=len(adapter.layers),
            newlines=newlines,
            held=None if self.plain and placed.simple else _held(item, slot, placed.table),
            table=placed.table,
        )


def _held(item: Tensor, slot: Tensor, table: ItemTable) -> Tensor | None:
    """(I, N) bool: the last tokens of prompts that end with a picture; None where none does. Prompts are (P, m)."""
    last = item[:, -1] >= 0
    if not bool(last.any()):
        return None
    held = torch.zeros(table.view.shape, dtype=torch.bool, device=item.device)
    held[item[last, -1], slot[last, -1]] = True
    return held


def build_context(
    adapter: Adapter, kinds: Tensor, records: Mapping[str, VisionRecord], embeds: Tensor, real: Tensor
) -> VisualContext:
    """The context of whole rows as they are, (B, S), for functions that ask where tokens stand and choose nothing."""
    placed = place(adapter, kinds, records, real.to(embeds.device))
    prompt = Prompt(placed, real, None, None, True, None, None)
    return prompt.context(embeds, View(None, None, real.to(embeds.device)), adapter, "drop")


# -------------------------------------------------------------------------------------------- where a prompt ends
def behind_labels(labels: Tensor | None, placed: Placed, real: Tensor, document: Tensor | None) -> Tensor | None:
    """(B, S) bool: an answer that is trained on, from the first supervised token behind the last picture.

    Labels that supervise placeholders of pictures are the ids themselves, which tell no answer from its question.

    Parameters
    ----------
    labels : Tensor or None
        (B, S) long, -100 where nothing is supervised.
    placed, real, document
        See `Prompt`.
    """
    if labels is None or labels.shape != real.shape:
        return None
    supervised = (labels.to(real.device) != IGNORED) & real
    if bool((supervised & (placed.item >= 0)).any()):
        return None
    part = torch.zeros_like(placed.item) if document is None else document
    # the last visual token of a document is the highest place that one of its tokens stands at
    at = torch.arange(real.shape[1], device=real.device).expand(real.shape)
    seen = torch.full_like(at, -1).scatter_reduce(1, part, torch.where(placed.item >= 0, at, -1), "amax")
    answers = supervised & (at > seen.gather(1, part))
    first = torch.full_like(at, real.shape[1]).scatter_reduce(1, part, torch.where(answers, at, real.shape[1]), "amin")
    behind = real & (at >= first.gather(1, part))
    return behind if bool(behind.any()) else None


def behind_length(length: int, past: int, real: Tensor) -> Tensor | None:
    """(B, S) bool: tokens beyond the ``length`` of the prompt, cached tokens included, that ``generate`` was given."""
    new = real.shape[1]
    if length >= past + new:
        return None
    at = torch.arange(past, past + new, device=real.device)
    return real & (at >= length)


@dataclass
class Generation:
    """One call of ``generate``: what only its beginning tells its later passes.

    Parameters
    ----------
    length : int
        Tokens of the prompt, those that a cache holds already included.
    start : int
        Tokens that the cache held when the call began.
    ids : Tensor or None
        (B, length) long: the ids of the prompt, where they are all given.
    records : dict
        Pictures and clips that were encoded since the call began, by modality.
    """

    length: int
    start: int
    ids: Tensor | None
    records: dict[str, VisionRecord] = field(default_factory=dict)


def generation_of(inputs: Any, kwargs: Mapping[str, Any], start: int) -> Generation | None:
    """What the arguments of ``generate`` say, whose cache holds ``start`` tokens; None if they give no prompt."""
    ids, embeds, mask = kwargs.get("input_ids", inputs), kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
    given = embeds if ids is None or ids.shape[1] == 0 else ids
    if not isinstance(given, Tensor):
        return None
    length = given.shape[1]
    if isinstance(mask, Tensor) and mask.dim() == 2:
        length = max(length, mask.shape[1])  # only new tokens may be given, beside a mask over cached ones too
    return Generation(length, start, ids if given is ids and ids.shape[1] == length else None)


class Generations(threading.local):
    """The calls of ``generate`` that a thread is inside of: drafting by the model itself calls it again."""

    def __init__(self) -> None:
        self.calls: list[Generation] = []

    @property
    def now(self) -> Generation | None:
        """The innermost call."""
        return self.calls[-1] if self.calls else None

    @contextlib.contextmanager
    def inside(self, generation: Generation) -> Iterator[None]:
        """For the length of one call."""
        self.calls.append(generation)
        try:
            yield
        finally:
            self.calls.pop()
