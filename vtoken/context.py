# SPDX-License-Identifier: Apache-2.0
"""What a reducer sees (`VisualContext`) and what it answers (`Cut`).

An *item* is one image or one video clip. Reducers work item-wise on padded tensors: I items in the whole batch, N
tokens in the longest of them. The order of an item's tokens is the order in which the language model sees them.

All of these are values: what follows a cut is a new context (`VisualContext.after`), nothing is changed in place. This
file must not know models, caches or masks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtoken.budget import Keep, budget
from vtoken.encoder import EncoderRead
from vtoken.ops.ragged import compact, gather

NEWLINE = -1
"""View number of an ``image_newline`` token."""


@dataclass(frozen=True)
class ItemLayout:
    """Where the tokens of one item come from.

    Parameters
    ----------
    view : Tensor
        (N,) long: the view a token belongs to, `NEWLINE` for separators. Views are crops, tiles or frames.
    row, column : Tensor
        (N,) long: place inside the grid of the view; 0 for separators.
    grids : tuple of (rows, columns)
        Full token grid of each view (some of its tokens may be cut away as padding).
    thumbnail : int or None
        The view that shows the whole image, where there is one beside its crops.
    crops : tuple of (rows, columns)
        Arrangement of the other views, (0, 0) if there are none or the model is not told.
    size : (height, width) or None
        The original picture in pixels, where the model is told.
    box : callable or None
        Gives (N, 4) float: x0, y0, x1, y1 of the part of the picture that a token shows, as shares of its width and
        height. None where every view shows the whole picture.
    """

    view: Tensor
    row: Tensor
    column: Tensor
    grids: tuple[tuple[int, int], ...]
    thumbnail: int | None = None
    crops: tuple[int, int] = (0, 0)
    size: tuple[int, int] | None = None
    box: Callable[[], Tensor] | None = None

    @property
    def newline(self) -> Tensor:
        """(N,) bool."""
        return self.view == NEWLINE


@dataclass(frozen=True)
class Cut:
    """The answer of a reducer, item-wise.

    Parameters
    ----------
    keep : Tensor
        (I, N) bool: tokens that stay. Text is never dropped.
    features : Tensor, optional
        (I, N, D): rewritten features of kept tokens (a merge writes into the slot of a kept token).
    sizes : Tensor, optional
        (I, N): how many patches stand behind each token.
    source : Tensor, optional
        (I, N) long: for each token the slot it was merged into, -1 where it was dropped.
    notes : mapping
        What the reducer wants to read in ``ctx.notes`` at its later layers of the same prefill.
    """

    keep: Tensor
    features: Tensor | None = None
    sizes: Tensor | None = None
    source: Tensor | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Attention:
    """Rows of decoder attention: ``probabilities`` (B, H, R, S) and which rows are real, ``valid`` (B, R).

    ``values`` (B, G, S, d), G dividing H, are what the rows average, and ``keys`` (B, G, S, d) what they look at,
    rotated and normalised as the layer has them; both where the layer was tapped.
    """

    probabilities: Tensor
    valid: Tensor
    values: Tensor | None = None
    keys: Tensor | None = None


@dataclass(frozen=True)
class TowerContext:
    """What a reducer sees inside of the vision tower: V views of G groups of patches each.

    A group is what becomes one token: a single patch, or the 2 x 2 patches that the model merges later.

    Parameters
    ----------
    statistics : mapping of str to Tensor
        (V, G) of the block before the cut, mean over the patches of a group, by the names of `Reducer.tower_reads`.
    """

    statistics: Mapping[str, Tensor]


@dataclass(frozen=True)
class Thinned:
    """The answer of a reducer that has patches dropped inside of the vision tower and rebuilt behind it.

    Parameters
    ----------
    keep : Tensor
        (K,) long, ascending: patches of a picture or view that later blocks compute.
    neighbours : Tensor
        (R, k) long: for each other patch, in order, the places in ``keep`` of those that stand for it: it is worth its
        state at the cut and the mean of their changes since.
    """

    keep: Tensor
    neighbours: Tensor


@dataclass(frozen=True, eq=False)
class ItemTable:
    """What does not change about the I items of a batch while their tokens are dropped.

    Parameters
    ----------
    layouts : sequence of ItemLayout
        One per item.
    view : Tensor
        (I, N) long: see `ItemLayout.view`, padded with ``NEWLINE - 1``.
    tokens : Tensor
        (I,) long: tokens that the prompt shows of each item; what the caller's mask hides is none of them.
    has_newlines : bool
        Whether any item has separators.
    """

    layouts: Sequence[ItemLayout]
    view: Tensor
    tokens: Tensor
    has_newlines: bool

    @classmethod
    def of(cls, layouts: Sequence[ItemLayout], device: torch.device, tokens: Tensor | None = None) -> ItemTable:
        """The table of such items, all of whose tokens are shown unless ``tokens`` (I,) says otherwise."""
        views = [layout.view for layout in layouts]
        view = torch.nn.utils.rnn.pad_sequence(views, True, NEWLINE - 1)
        has_newlines = bool((view == NEWLINE).any())  # before it is moved: no look at a device
        if tokens is None:
            tokens = torch.tensor([len(view) for view in views], device=device)
        return cls(layouts, view.to(device), tokens, has_newlines)

    def to(self, device: torch.device) -> ItemTable:
        """The table on another device."""
        if self.view.device == device:
            return self
        return replace(self, view=self.view.to(device), tokens=self.tokens.to(device))

    @functools.cached_property
    def newline(self) -> Tensor:
        """(I, N) bool."""
        return self.view == NEWLINE


class _Index(NamedTuple):
    """Where the visual tokens of a sequence are, row and column, and which they are, item and slot."""

    here: tuple[Tensor, ...]
    token: tuple[Tensor, Tensor]
    valid: Tensor
    """(I, N) bool: tokens that are there."""


@dataclass(frozen=True, eq=False)
class VisualContext:
    """What a reducer sees: one row for each prompt, left-padded, at one stage of the model.

    A row is the *prompt* of one document: what a packed row holds beside it, padding, and the draft, generated or
    supervised tokens behind the prompt are not in it. So a choice cannot depend on them.

    Parameters
    ----------
    hidden : Tensor
        (B, S, D): ``inputs_embeds`` before the language model, hidden states at a layer.
    item, slot : Tensor
        (B, S) long: item of a visual token and its place in it; -1 elsewhere.
    text : Tensor
        (B, S) bool: neither visual nor padding.
    layouts : sequence of ItemLayout
        One per item.
    encoder : mapping of EncoderRead to Tensor
        (I, N) or (I, N, C) statistics of the vision tower; NaN where a token has none.
    resampled : sequence of Tensor
        (rows, columns, D) features of each item, encoded at the resolution that `Reducer.picture_grid` asked for.
    sizes : Tensor or None
        (I, N): how many patches stand behind each token, where tokens were merged.
    layer : int
        -1 before the language model, else the decoder layer that comes next; ``depth`` behind the last one.
    attention : mapping of int to Attention
        Recorded rows of earlier layers, see `Reducer.taps`.
    peek : callable
        At a layer: ``peek(what)`` gives attention rows of the coming layer, named as in `Reducer.taps`.
    rerun : callable
        At a layer: ``rerun(keep)`` gives the states (B, S, D) that the coming layer makes of the tokens ``keep``
        (B, S) bool if there are no others; those of other tokens mean nothing.
    notes : mapping
        What the cuts of earlier stages of the same prefill left, see `Cut.notes`.
    held : Tensor or None
        (I, N) bool: the last token of a prompt that ends with a picture. It stays whatever is chosen, within the
        budget of its item, since the next token comes from its state; it is no candidate.
    table : ItemTable, optional
        Made from the layouts where it is not given.
    """

    hidden: Tensor
    item: Tensor
    slot: Tensor
    text: Tensor
    layouts: Sequence[ItemLayout]
    encoder: Mapping[EncoderRead, Tensor] = field(default_factory=dict)
    projector_input: Tensor | None = None
    projector: Callable[[Tensor], Tensor] | None = None
    resampled: Sequence[Tensor] = ()
    sizes: Tensor | None = None
    layer: int = -1
    depth: int = 0
    attention: Mapping[int, Attention] = field(default_factory=dict)
    peek: Callable[[str], Attention] | None = None
    rerun: Callable[[Tensor], Tensor] | None = None
    newlines: str = "drop"
    notes: Mapping[str, Any] = field(default_factory=dict)
    held: Tensor | None = None
    table: ItemTable = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        table = ItemTable.of(self.layouts, self.hidden.device) if self.table is None else self.table
        object.__setattr__(self, "table", table.to(self.item.device))

    @functools.cached_property
    def _index(self) -> _Index:
        here = self.visual.nonzero(as_tuple=True)
        token = self.item[here], self.slot[here]
        valid = torch.zeros(self.items, self.longest, dtype=torch.bool, device=self.item.device)
        valid[token] = True
        return _Index(here, token, valid)

    @property
    def longest(self) -> int:
        """N, tokens of the longest item."""
        return self.table.view.shape[1]

    @property
    def view(self) -> Tensor:
        """(I, N) long: the view of each token, see `ItemTable`."""
        return self.table.view

    @property
    def tokens(self) -> Tensor:
        """(I,) long: tokens that the prompt shows of each item."""
        return self.table.tokens

    @property
    def newline(self) -> Tensor:
        """(I, N) bool: separators."""
        return self.table.newline

    @property
    def has_newlines(self) -> bool:
        """Whether any item has separators."""
        return self.table.has_newlines

    @functools.cached_property
    def visual(self) -> Tensor:
        """(B, S) bool."""
        return self.item >= 0

    @property
    def items(self) -> int:
        """Number of images and clips in the batch."""
        return len(self.layouts)

    def rows(self, what: str) -> tuple[Tensor, Tensor]:
        """Places (B, R) of the tokens named ``what``, right aligned, and which are real; padding repeats the last one.

        Parameters
        ----------
        what : str
            ``"last"``, the last token of the prompt; ``"text"``; ``"all"``; or ``"question"``, the text behind the
            last visual token, all text if there is none. The text of a prompt that has none is its last token.
        """
        real = self.text | self.visual
        last = real.shape[1] - 1 - real.flip(1).to(torch.int8).argmax(1, keepdim=True)
        if what == "last":
            return last, torch.ones_like(last, dtype=torch.bool)
        wanted = real if what == "all" else self.text
        if what == "question":
            question = self.text & (self.visual.flip(1).cumsum(1).flip(1) == 0)
            wanted = torch.where(question.any(1, keepdim=True), question, wanted)
        ends = torch.zeros_like(real).scatter(1, last, True) & real
        index, valid = compact(torch.where(wanted.any(1, keepdim=True), wanted, ends))
        return torch.where(valid, index, last), valid

    def per_item(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """Gather a per-token tensor (B, S, ...) into (I, N, ...); ``fill`` where a token is no longer there."""
        here, token, _ = self._index
        out = x.new_full((self.items, self.longest, *x.shape[2:]), fill)
        out[token] = x[here]
        return out

    def per_token(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """Spread an item-wise tensor (I, N, ...) over the sequence: (B, S, ...)."""
        here, token, _ = self._index
        out = x.new_full((*self.item.shape, *x.shape[2:]), fill)
        out[here] = x[token]
        return out

    @property
    def row(self) -> Tensor:
        """(I,) long: the row of each item, -1 where nothing of it is left."""
        rows = torch.arange(self.item.shape[0], device=self.item.device)[:, None].expand_as(self.item)
        return self.per_item(rows, -1).amax(1)

    @property
    def features(self) -> Tensor:
        """(I, N, D) visual features, zero on the padding."""
        return self.per_item(self.hidden)

    @property
    def valid(self) -> Tensor:
        """(I, N) bool: tokens that are still in the sequence."""
        return self._index.valid

    @functools.cached_property
    def candidates(self) -> Tensor:
        """(I, N) bool: tokens a reducer chooses from, which excludes newlines and what is `held`."""
        found = self.valid & ~self.newline if self.has_newlines else self.valid
        return found if self.held is None else found & ~self.held

    @property
    def counted(self) -> Tensor:
        """(I,) long: tokens of each item that a ratio is a share of.

        Newlines that are always kept (``newlines="keep"``) come on top; where they are dropped they count among the
        tokens of the item.
        """
        return self.tokens - self.newline.sum(1) if self.newlines == "keep" else self.tokens

    def budget(self, keep: Keep) -> Tensor:
        """(I,) long: candidates to keep of each item for a ``keep`` of its original tokens."""
        return self.to_choose(budget(keep, self.counted))

    def to_choose(self, wanted: Tensor) -> Tensor:
        """(I,) long: how many of ``wanted`` (I,) tokens are left to choose, as the `held` one is chosen already."""
        if self.held is None:
            return wanted
        held = self.held & ~self.newline if self.newlines == "keep" else self.held
        return (wanted - held.sum(1)).clamp(min=0)

    def cut(self, index: Tensor, features: Tensor | None = None, sizes: Tensor | None = None) -> Cut:
        """The `Cut` that keeps the selected tokens.

        Parameters
        ----------
        index : Tensor
            (I, K) long slots in any order, padded with -1; or an (I, N) bool mask.
        """
        if index.dtype == torch.bool:
            keep = index
        else:
            keep = self.valid.new_zeros(self.items, self.longest + 1)
            keep = keep.scatter_(1, index.masked_fill(index < 0, self.longest), True)[:, :-1]
        return Cut(keep, features, sizes)

    def kept(self, cut: Cut) -> Tensor:
        """(I, N) bool: what stays of each item, the `held` token included."""
        return cut.keep if self.held is None else cut.keep | self.held.to(cut.keep.device)

    def after(self, cut: Cut) -> VisualContext:
        """The context that a later stage of a chain sees: dropped tokens are no longer visual, the length stays."""
        stays = self.per_token(self.kept(cut), False)
        return replace(
            self,
            hidden=self.rewritten(cut),
            item=self.item.masked_fill(~stays, -1),
            slot=self.slot.masked_fill(~stays, -1),
            sizes=self.sizes if cut.sizes is None else cut.sizes,
            notes={**self.notes, **cut.notes},
        )

    def same_tokens(self, **changes: Any) -> VisualContext:
        """The same tokens at another stage: with other states, attention, notes ..."""
        found = replace(self, **changes)
        if "_index" in vars(self):  # looking for the tokens waits for the device
            vars(found)["_index"] = vars(self)["_index"]
        return found

    def rewritten(self, cut: Cut) -> Tensor:
        """(B, S, D): the hidden states with the features that the cut gives to the tokens it keeps."""
        if cut.features is None:
            return self.hidden
        stays = self.per_token(cut.keep, False)
        return torch.where(stays[..., None], self.per_token(cut.features.to(self.hidden.dtype)), self.hidden)

    def text_embeddings(self) -> tuple[Tensor, Tensor]:
        """Text states of each row, right aligned: (B, T, D) and their validity (B, T)."""
        index, valid = compact(self.text)
        return gather(self.hidden, index), valid
