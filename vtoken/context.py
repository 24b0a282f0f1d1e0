# SPDX-License-Identifier: Apache-2.0
"""What a reducer sees (`VisualContext`) and what it answers (`Cut`).

An *item* is one image or one video clip. Reducers work item-wise on padded tensors: I items in the whole batch, N
tokens in the longest of them. The order of an item's tokens is the order in which the language model sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtoken.budget import Keep, budget
from vtoken.encoder import EncoderRead

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
    """

    keep: Tensor
    features: Tensor | None = None
    sizes: Tensor | None = None
    source: Tensor | None = None


@dataclass
class Attention:
    """Rows of decoder attention: ``probabilities`` (B, H, R, S) and which rows are real, ``valid`` (B, R).

    ``values`` (B, G, S, d), G dividing H, are what the rows average, where the layer was tapped.
    """

    probabilities: Tensor
    valid: Tensor
    values: Tensor | None = None


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


class _Index(NamedTuple):
    """Where the visual tokens of a sequence are, row and column, and which they are, item and slot."""

    here: tuple[Tensor, ...]
    token: tuple[Tensor, Tensor]
    valid: Tensor
    """(I, N) bool: tokens that are there."""


@dataclass
class VisualContext:
    """A left-padded batch at one stage of the model; every (B, S) field follows the sequence as it is now.

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
    layer : int
        -1 before the language model, else the decoder layer that comes next.
    peek : callable
        At a layer: ``peek(what)`` gives attention rows of the coming layer, named as in `Reducer.taps`.
    rerun : callable
        At a layer: ``rerun(keep)`` gives the states (B, S, D) that the coming layer makes of the tokens ``keep``
        (B, S) bool if there are no others; those of other tokens mean nothing.
    scratch : dict
        What a reducer leaves for its later layers in the same prefill.
    """

    hidden: Tensor
    item: Tensor
    slot: Tensor
    text: Tensor
    layouts: Sequence[ItemLayout]
    encoder: Mapping[EncoderRead, Tensor] = field(default_factory=dict)
    position_ids: Tensor | None = None
    projector_input: Tensor | None = None
    projector: Callable[[Tensor], Tensor] | None = None
    resampled: Sequence[Tensor] = ()
    sizes: Tensor | None = None
    layer: int = -1
    depth: int = 0
    attention: dict[int, Attention] = field(default_factory=dict)
    peek: Callable[[str], Attention] | None = None
    rerun: Callable[[Tensor], Tensor] | None = None
    newlines: str = "drop"
    scratch: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.longest = max(len(layout.view) for layout in self.layouts)
        views = [layout.view for layout in self.layouts]
        view = torch.nn.utils.rnn.pad_sequence(views, True, NEWLINE - 1)
        self.has_newlines = bool((view == NEWLINE).any())  # before it is moved: no look at a device
        self.view = view.to(self.hidden.device)
        self.tokens = torch.tensor([len(view) for view in views], device=self.hidden.device)
        self.newline = self.view == NEWLINE
        self._known: tuple[Tensor, Tensor, _Index] | None = None

    @property
    def _index(self) -> _Index:
        """Found once for a sequence."""
        known = self._known
        if known is None or known[0] is not self.item or known[1] is not self.slot:
            here = self.visual.nonzero(as_tuple=True)
            token = self.item[here], self.slot[here]
            valid = torch.zeros(self.items, self.longest, dtype=torch.bool, device=self.item.device)
            valid[token] = True
            self._known = known = self.item, self.slot, _Index(here, token, valid)
        return known[2]

    @property
    def visual(self) -> Tensor:
        """(B, S) bool."""
        return self.item >= 0

    @property
    def items(self) -> int:
        """Number of images and clips in the batch."""
        return len(self.layouts)

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
        """(I,) long: the batch row of each item."""
        rows = torch.arange(self.item.shape[0], device=self.item.device)[:, None].expand_as(self.item)
        return self.per_item(rows, -1).amax(1)

    @property
    def features(self) -> Tensor:
        """(I, N, D) visual features, zero on the padding."""
        return self.per_item(self.hidden)

    @property
    def valid(self) -> Tensor:
        """(I, N) bool: tokens that are still in the sequence; not to be changed."""
        return self._index.valid

    @property
    def candidates(self) -> Tensor:
        """(I, N) bool: tokens a reducer chooses from, which excludes newlines; not to be changed."""
        return self.valid & ~self.newline if self.has_newlines else self.valid

    def budget(self, keep: Keep) -> Tensor:
        """(I,) long: candidates to keep of each item for a ``keep`` of its original tokens.

        Newlines that are always kept (``newlines="keep"``) come on top; where they are dropped they count among the
        tokens of the item.
        """
        tokens = self.tokens - self.newline.sum(1) if self.newlines == "keep" else self.tokens
        return budget(keep, tokens)

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

    def after(self, cut: Cut) -> VisualContext:
        """The context that a later stage of a chain sees: dropped tokens are no longer visual, the length stays."""
        stays = self.per_token(cut.keep, False)
        return replace(
            self,
            hidden=self.rewritten(cut),
            item=self.item.masked_fill(~stays, -1),
            slot=self.slot.masked_fill(~stays, -1),
            sizes=self.sizes if cut.sizes is None else cut.sizes,
        )

    def rewritten(self, cut: Cut) -> Tensor:
        """(B, S, D): the hidden states with the features that the cut gives to the tokens it keeps."""
        if cut.features is None:
            return self.hidden
        stays = self.per_token(cut.keep, False)
        return torch.where(stays[..., None], self.per_token(cut.features.to(self.hidden.dtype)), self.hidden)

    def text_embeddings(self) -> tuple[Tensor, Tensor]:
        """Text states of each row, right aligned: (B, T, D) and their validity (B, T)."""
        from vtoken.sequence import compact, gather

        index, valid = compact(self.text)
        return gather(self.hidden, index), valid
