# SPDX-License-Identifier: Apache-2.0
"""The state of one call of a wrapped model, from the outer forward to the restored output: its only home.

A `Forward` is made when the outer module is called and closed when the language model has returned or raised. One that
was left open by an interrupt is closed by the next call. This file must not know hooks.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtoken.adapters.base import MODALITIES
from vtoken.engine import cache as kv
from vtoken.engine.masks import columns_of, is_prepared
from vtoken.engine.tower import VisionRecord, expand_items, record_of

if TYPE_CHECKING:
    from vtoken.adapters.base import Adapter
    from vtoken.engine.prefill import Prefill
    from vtoken.engine.prompt import Generation

TWO_THREADS = (
    "Two threads are running one wrapped model at the same time: give each thread its own copy, "
    "or guard the calls with a lock."
)


class Forward:
    """One call: a prefill with new visual tokens (``kinds``), or a pass without.

    Parameters
    ----------
    cache : Cache or None
        The one given.
    labels : Tensor or None
        (B, S) long, of a training pass.
    pictures : bool
        Whether the outermost module was given any.

    Attributes
    ----------
    entered : bool
        False while it waits for the outer module (or, without one, the language model) to be called.
    mask_to_hand_on : Tensor or None
        The caller's mask, which the outermost module must not see.
    first : Tensor or None
        (D,) the first visual token of an announced call.
    ids : Tensor or None
        (B, S) long: token ids of a call with pictures.
    kinds : Tensor or None
        (B, S) long: modality of each placeholder, 0 for text.
    records : dict
        Encoded items by modality.
    mask2d : Tensor or None
        The caller's mask over cached and new tokens, (B, L).
    prefill : Prefill or None
        From the first cut on.
    taps : ExitStack
        What is open on attention modules while the language model runs.
    masks : dict
        Decode masks by group of cache columns and kind of layer: a memo.
    """

    def __init__(self, cache: Any, labels: Tensor | None = None, pictures: bool = False) -> None:
        self.thread = threading.get_ident()
        self.cache, self.labels, self.pictures = cache, labels, pictures
        self.entered = False
        self.mask_to_hand_on: Tensor | None = None
        self.first: Tensor | None = None
        self.ids: Tensor | None = None
        self.kinds: Tensor | None = None
        self.records: dict[str, VisionRecord] = {}
        self.mask2d: Tensor | None = None
        self.prefill: Prefill | None = None
        self.taps = contextlib.ExitStack()
        self.masks: dict[Any, Any] = {}

    @property
    def asked(self) -> dict[str, Tensor]:
        """What tells this prompt from others."""
        marks = {modality: record.mark for modality, record in self.records.items() if record.mark is not None}
        return marks if self.ids is None else {"input_ids": self.ids, **marks}

    def close(self) -> None:
        """Take the taps off and let go of the cache; a second time does nothing."""
        self.taps.close()
        kv.serve(self.cache, False)

    # ------------------------------------------------------------------ opening
    def announced_for(self, embeds: Tensor | None) -> bool:
        """Whether it was announced for these ``inputs_embeds``; beams repeat every row in a block."""
        if self.kinds is None or self.first is None or embeds is None or embeds.shape[1] != self.kinds.shape[1]:
            return False
        if len(embeds) % len(self.kinds):
            return False
        kinds = self.kinds.to(embeds.device).repeat_interleave(len(embeds) // len(self.kinds), 0)
        visual = embeds[kinds > 0]
        if not len(visual) or not torch.equal(visual[0], self.first.to(visual)):
            return False  # left over from a call that raised
        self.kinds = kinds  # safe: asked once, by the call that it was announced for
        return True

    def enter_cache(self, given: Tensor, mask: Any) -> Any:
        """Note the caller's mask, check that a pruned cache fits the tokens ``given`` (B, S, ...).

        Returns
        -------
        Tensor, mapping or None
            ``mask``, or that of a pruned cache's columns in its place.

        Raises
        ------
        RuntimeError
            If the cache holds another batch.
        NotImplementedError
            If a static cache would take a further prompt.
        """
        self.mask2d = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        pruned = kv.pruned_of(self.cache)
        if pruned is None:
            return mask
        if len(pruned.valid) != len(given):
            raise RuntimeError(
                f"The cache was pruned for a batch of {len(pruned.valid)}, not {len(given)}: start with a new cache."
            )
        if kv.is_static(self.cache) and given.shape[1] > 1:
            raise NotImplementedError(
                "A pruned StaticCache cannot take a further prompt, it does not know its logical length: "
                "use a dynamic cache for several turns, or call its reset() before a new prompt."
            )
        kv.serve(self.cache, True)
        if self.kinds is not None or isinstance(mask, Mapping) or is_prepared(mask) or kv.is_static(self.cache):
            return mask
        return columns_of(self.cache, 0, given.shape[1], mask)

    def take_encoded(
        self, adapter: Adapter, encoded: Mapping[str, Any], generation: Generation | None, past: int
    ) -> None:
        """Take what is known of pictures that were encoded before the pass (``mm_encoder_outputs``).

        Raises
        ------
        NotImplementedError
            If nothing is known of them, or a chunk of a chunked prefill holds a part of a picture only.
        """
        assert self.kinds is not None
        for modality, output in encoded.items():
            if output is None:
                continue
            if (record := record_of(output)) is not None:
                self.records[modality] = record
            elif generation is not None and modality in generation.records:
                # generate() made another output of it: repeated for beams, moved to a device, or cut into chunks
                known = generation.ids is not None
                whole = generation.records[modality]
                record = chunk_record(adapter, generation, modality, self.kinds, past) if known else whole
                self.records[modality] = record
            else:
                raise NotImplementedError(
                    "Nothing is known of the pictures behind these visual features (mm_encoder_outputs), which the "
                    "wrapped model did not compute, or which were copied since: pass the pixels to forward or generate "
                    "instead, or encode with the wrapped model."
                )


def chunk_record(adapter: Adapter, generation: Generation, modality: str, kinds: Tensor, past: int) -> VisionRecord:
    """What is known of the items in one chunk of a chunked prefill.

    Parameters
    ----------
    kinds : Tensor
        (B, S) long: modalities of the chunk, which begins at the place ``past`` of the prompt.

    Raises
    ------
    NotImplementedError
        If an item is only partly in the chunk.
    """
    assert generation.ids is not None
    here = adapter.modality(generation.ids, None) == MODALITIES[modality]
    record = adapter.regroup(generation.records[modality], here)
    waiting = iter(expand_items(record.lengths, here.sum(1).tolist()))
    chosen: list[list[int]] = []
    end = past + kinds.shape[1]
    for row in here:
        places, inside, first = row.nonzero()[:, 0].tolist(), [], 0
        while first < len(places):
            item = next(waiting)
            last = first + record.lengths[item] - 1
            if places[first] >= past and places[last] < end:
                inside.append(item)
            elif places[first] < end and places[last] >= past:
                raise NotImplementedError(
                    f"prefill_chunk_size={end - past} cuts a picture of {record.lengths[item]} tokens in two, at place "
                    f"{end if places[last] >= end else past} of the prompt: choose a chunk size that leaves every "
                    "picture whole, or none."
                )
            first = last + 1
        chosen.append(inside)
    times = len(kinds) // len(here)  # beams repeat every row in a block
    return record.pick([item for inside in chosen for _ in range(times) for item in inside])


def is_inside(thread: int, modules: Iterable[nn.Module | None]) -> bool:
    """Whether a thread is inside of a call of one of the modules now.

    An interrupt or a thread that died leaves no trace of its own but the call that it did not finish; its stack tells.
    """
    wanted = {id(module) for module in modules if module is not None}
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and id(frame.f_locals.get("self")) in wanted:
            return True
        frame = frame.f_back
    return False
