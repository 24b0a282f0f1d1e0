# SPDX-License-Identifier: Apache-2.0
"""The vision side of a wrapped model: what the encoder said about each visual token.

``generate`` encodes the pictures before the forward pass (transformers >= 5.18), a plain forward inside of it. Both
call ``get_image_features`` on the outer module, which the session wraps. What was read there is left in the `Forward`
that is under way, else in the call of ``generate``, which may copy the output; and beside that in an attribute of it.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtoken.context import ItemLayout
from vtoken.encoder import EncoderRead, TowerCall, read_calls, separated
from vtoken.engine.towercut import TowerCut
from vtoken.engine.towerrows import EntryCut, ReturnCut, RowCut

if TYPE_CHECKING:
    from vtoken.adapters.base import Adapter
    from vtoken.reducers.base import Reducer

SAMPLES = 64  # pixels of a mark


@dataclass
class VisionRecord:
    """What is known about the items of one modality, in the order of their features.

    Parameters
    ----------
    lengths : list of int
        Visual tokens of each item.
    layouts : list of ItemLayout
        One per item.
    maps : dict
        Per request a (T,) or (T, C) tensor over the T tokens of all items; NaN where a token has no value.
    projector_input : Tensor or None
        (T, C) rows that the projector was given, NaN for separators.
    dropped : Tensor or None
        (T,) bool: tokens whose patches were dropped inside of the tower; None if nothing was.
    resampled : list of Tensor or None
        (rows, columns, D) features of each item at another resolution; None if none was asked for.
    mark : Tensor or None
        Numbers that tell the pixels from others, see `mark_of`; None if nothing encoded them that could be asked.
    patches : tuple of int or None
        Patches of the items that were encoded together, and those that the later blocks of the tower computed; None if
        none were left out.
    """

    lengths: list[int]
    layouts: list[ItemLayout]
    maps: dict[EncoderRead, Tensor]
    projector_input: Tensor | None = None
    dropped: Tensor | None = None
    resampled: list[Tensor] | None = None
    mark: Tensor | None = None
    patches: tuple[int, int] | None = None

    def pick(self, items: list[int]) -> VisionRecord:
        """The record of such items, in their order, each as often as it is named."""

        def take(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            parts = values.split(self.lengths)
            return torch.cat([values[:0], *(parts[i] for i in items)])

        maps: dict[EncoderRead, Tensor] = {read: take(values) for read, values in self.maps.items()}  # type: ignore[misc]
        resampled = None if self.resampled is None else [self.resampled[i] for i in items]
        lengths, layouts = [self.lengths[i] for i in items], [self.layouts[i] for i in items]
        before, dropped = take(self.projector_input), take(self.dropped)
        return VisionRecord(lengths, layouts, maps, before, dropped, resampled, self.mark, self.patches)


@dataclass
class Observed:
    """What was seen of the tower during one call of ``get_*_features``, in its own order.

    Parameters
    ----------
    output : object
        What the call returned.
    maps : dict
        Per request one (views, tokens) or (views, tokens, C) tensor for each call of the layer; 0 at patches that
        were dropped before, NaN at padding.
    partial : set
        Requests of layers that worked on kept patches only.
    inputs : list of Tensor
        What the projector was given, per call.
    kept : list of Tensor
        (views, tokens) bool, per call of the tower; empty if no token was dropped before or inside of it.
    patches : tuple of int or None
        See `VisionRecord`.
    """

    output: Any
    maps: dict[EncoderRead, list[Tensor]]
    partial: set[EncoderRead]
    inputs: list[Tensor]
    kept: list[Tensor]
    patches: tuple[int, int] | None = None

    def packed(
        self, pack: Callable[[list[Tensor]], Tensor], skip: int
    ) -> tuple[dict[EncoderRead, Tensor], Tensor | None]:
        """The maps in token order, (T,) or (T, C), and which tokens (T,) were dropped inside of the tower.

        A token that is interpolated from several patches stays if most of it comes from kept ones.

        Parameters
        ----------
        pack : callable
            Brings (views, patches, C) maps, one for each call of the tower, to token order (T, C).
        skip : int
            Tokens of the tower, from the first one on, that ``pack`` does not want; see `Adapter.skipped_tokens`.
        """

        def packed(parts: list[Tensor]) -> Tensor:
            scalar = parts[0].dim() == 2
            parts = [part[:, skip:] for part in parts]
            out = pack([part[..., None] if scalar else part for part in parts])
            return out[..., 0] if scalar else out

        maps = {read: packed(parts) for read, parts in self.maps.items()}
        if not self.kept:
            return maps, None
        share = packed([part.float() for part in self.kept])  # of each token that comes from kept patches
        dropped = share <= 0.5
        for read, values in maps.items():
            wide = (...,) + (None,) * (values.dim() - 1)
            weight = share if read in self.partial else torch.ones_like(share)
            maps[read] = (values / weight[wide]).masked_fill(dropped[wide], float("nan"))
        return maps, dropped


def record_of(output: Any) -> VisionRecord | None:
    """What is known of the features of a ``get_*_features`` output, None where it was not made by a wrapped model."""
    return getattr(output, "vtoken", None)


def feature_list(output: Any) -> list[Tensor]:
    """The per-item features (N_i, D) of a ``get_image_features`` output, which has one tensor or several."""
    features = getattr(output, "pooler_output", output)
    if features is None:  # a model without a projector of its own, or one that hands over features by decoder layer
        features = output.last_hidden_state
    if features is None:
        features = output.deepstack_features[0][1]
    if isinstance(features, Tensor) and features.dim() == 2:
        return [features]
    return [item.reshape(-1, item.shape[-1]) for item in features]


class VisionReader:
    """Wraps one ``get_*_features`` call: opens the taps, calls the model, maps what was seen to tokens.

    Parameters
    ----------
    adapter : Adapter
        Knows the tower and how its patches become tokens.
    reads : sequence of EncoderRead
        Requested statistics.
    projector : bool
        Whether to record the projector's input.
    cutter : Reducer or None
        One that drops patches inside of the tower.
    resampler : Reducer or None
        One that wants the pictures encoded at another resolution too.
    """

    def __init__(
        self,
        adapter: Adapter,
        reads: Sequence[EncoderRead],
        projector: bool,
        cutter: Reducer | None = None,
        resampler: Reducer | None = None,
    ) -> None:
        self.adapter, self.reads, self.projector, self.cutter = adapter, list(reads), projector, cutter
        self.resampler = resampler
        self.thread: int | None = None  # the thread that encodes now; put back whatever happens
        self._signatures: dict[str, inspect.Signature] = {}  # reading one takes half a millisecond

    def __call__(self, original: Callable, modality: str, *args: Any, **kwargs: Any) -> Any:
        as_tuple = kwargs.get("return_dict") is False
        given = {**kwargs, "return_dict": True} if as_tuple else kwargs
        seen = self.observe(lambda: original(*args, **given), modality)
        if modality not in self._signatures:
            self._signatures[modality] = inspect.signature(original)
        bound = self._signatures[modality].bind_partial(*args, **given)
        call = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        record = self._record(seen, modality, call)
        if self.resampler is not None:
            record.resampled = self._resample(original, modality, call, record.layouts)
        if as_tuple:
            return seen.output.to_tuple(), record
        if hasattr(seen.output, "pooler_output"):
            seen.output.vtoken = record  # an attribute: as a mapping and as a tuple the output stays as stock
        return seen.output, record

    def _resample(self, original: Callable, modality: str, call: dict, layouts: list[ItemLayout]) -> list[Tensor]:
        """Encode the pictures once more: (rows, columns, D) of each item."""
        assert self.resampler is not None
        grids = [self.resampler.picture_grid(layout) for layout in layouts]
        smaller = self.adapter.resampled(modality, call, grids)
        self.thread = threading.get_ident()
        try:
            features = torch.cat(feature_list(original(**smaller)))
        finally:
            self.thread = None
        parts = features.split([rows * columns for rows, columns in grids])
        return [part.unflatten(0, grid) for part, grid in zip(parts, grids, strict=True)]

    def observe(self, run: Callable, modality: str = "image") -> Observed:
        """Call ``run``, which encodes pictures or clips, with the taps open."""
        calls: dict[int, list[TowerCall]] = {}
        inputs: list[Tensor] = []
        self.thread = threading.get_ident()
        try:
            cut = tower_cut(self.adapter, self.cutter, modality)
            with contextlib.ExitStack() as stack:
                if cut is not None:
                    cut.open(stack)
                self._open_taps(stack, calls, cut)
                if self.projector:
                    # prepend: before rows are left out
                    hook = self.adapter.projector.register_forward_pre_hook(
                        lambda m, a: inputs.append(a[0].detach()), prepend=True
                    )
                    stack.callback(hook.remove)
                output = run()
        finally:
            self.thread = None
        maps, partial = self._maps(calls, cut)
        if cut is None:
            return Observed(output, maps, partial, inputs, [])
        return Observed(output, maps, partial, inputs, cut.kept, cut.patches)

    def _open_taps(
        self, stack: contextlib.ExitStack, calls: dict[int, list[TowerCall]], cut: TowerCut | RowCut | None
    ) -> None:
        wanted = {self.adapter.read_block(read.layer) for read in self.reads}
        chooses = {cut.block - 1} if isinstance(cut, TowerCut) else set()
        for layer in sorted(wanted | chooses):
            note = cut.note if isinstance(cut, TowerCut) and layer in chooses else None
            keep = calls.setdefault(layer, []) if layer in wanted else None

            @torch.no_grad()
            def read(
                module: nn.Module, q: Tensor, k: Tensor, mask: Any, kwargs: Any, note: Any = note, keep: Any = keep
            ) -> None:
                scale = kwargs.get("scaling") or q.shape[-1] ** -0.5
                k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # heads that share their keys
                if note is not None:
                    note(q, k, scale)
                if keep is not None:
                    pictures = separated(mask, kwargs.get("cu_seq_lens_q"), len(q), q.shape[2])
                    keep.append(TowerCall(q.detach(), k.detach(), scale, pictures))

            stack.enter_context(self.adapter.tap_tower(layer, read))

    @torch.no_grad()
    def _maps(
        self, calls: dict[int, list[TowerCall]], cut: TowerCut | RowCut | None
    ) -> tuple[dict[EncoderRead, list[Tensor]], set[EncoderRead]]:
        """The statistics, (views, tokens, ...) per call of their layer, and which of them know kept patches only."""
        if not all(calls.values()):
            raise ValueError(
                f"The vision tower of {type(self.adapter.model).__name__} computes its attention with code of its own, "
                "which cannot be read: use a reducer that needs no encoder attention."
            )
        maps, partial = {}, set()
        first = self.adapter.leading_tokens
        for read in self.reads:
            layer = self.adapter.read_block(read.layer)
            found = read_calls(read.resolve(first > 0).what, calls[layer], first)
            if cut is not None and layer >= cut.block:
                found = cut.widen(found)
                partial.add(read)
            maps[read] = found
        return maps, partial

    def _record(self, seen: Observed, modality: str, call: dict) -> VisionRecord:
        lengths = self.adapter.item_lengths(feature_list(seen.output), call)
        layouts = self.adapter.layouts(modality, call, lengths)
        self.thread = threading.get_ident()  # to pack may mean to encode once more
        try:
            with torch.no_grad():
                skip = self.adapter.skipped_tokens(call)
                maps, dropped = seen.packed(lambda parts: self.adapter.pack(parts, modality, call), skip)
                before = self.adapter.pack_projector_input(seen.inputs, modality, call) if seen.inputs else None
        finally:
            self.thread = None
        for found in (*maps.values(), before, dropped):
            if found is not None and len(found) != sum(lengths):
                raise RuntimeError(
                    f"The {type(self.adapter).__name__} adapter mapped the encoder to {len(found)} values "
                    f"for {sum(lengths)} visual tokens: its packing does not fit this model; please report it."
                )
        return VisionRecord(lengths, layouts, maps, before, dropped, mark=mark_of(call), patches=seen.patches)


@torch.no_grad()
def mark_of(call: Mapping[str, Any]) -> Tensor:
    """Sum and a few values of each tensor of real numbers among arguments: other pictures give others."""
    pixels = [value.flatten() for value in call.values() if isinstance(value, Tensor) and value.is_floating_point()]
    marks = [
        part for one in pixels for part in (one.sum(dtype=torch.float32)[None], one[:: max(1, len(one) // SAMPLES)])
    ]
    return torch.cat([mark.float() for mark in marks]) if marks else torch.empty(0, device="cpu")


def tower_cut(adapter: Adapter, reducer: Reducer | None, modality: str) -> TowerCut | RowCut | None:
    """What leaves patches out of the tower for a reducer; None where none does."""
    if reducer is None:
        return None
    if reducer.overrides("before_tower"):
        return EntryCut(adapter, reducer)
    if reducer.overrides("thin_tower"):
        return ReturnCut(adapter, reducer)
    return TowerCut(adapter, reducer, modality)


def expand_items(lengths: list[int], counts: list[int]) -> list[int]:
    """Which recorded item each item of the batch is.

    Beam search and ``num_return_sequences`` repeat every row in a block, with all of its items.

    Parameters
    ----------
    lengths : list of int
        Tokens of each recorded item.
    counts : list of int
        Visual tokens of each row of the batch.

    Returns
    -------
    list of int
        Indices into ``lengths``, in the order of the batch.
    """
    total = sum(lengths)
    if total == 0 or sum(counts) % total:
        raise NotImplementedError(
            f"The prompt has {sum(counts)} placeholders for {total} encoded visual tokens, so that they cannot be told "
            "apart: pass the pictures that the prompt names, and no others."
        )
    times = sum(counts) // total if total else 1
    out: list[int] = []
    position = 0
    for count in counts[::times]:
        row, filled = [], 0
        while filled < count:
            row.append(position)
            filled += lengths[position]
            position += 1
        out += row * times
    return out
