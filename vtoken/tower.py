# SPDX-License-Identifier: Apache-2.0
"""The vision side of a wrapped model: what the encoder said about each visual token.

``generate`` encodes the pictures before the forward pass (transformers >= 5.18), a plain forward inside of it. Both
call ``get_image_features`` on the outer module, which the session wraps: what was read there travels with the features
to the prefill as an *item* of the output, because accelerate's hooks rebuild the object and lose its attributes.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtoken.context import ItemLayout
from vtoken.encoder import STATISTICS, EncoderRead

if TYPE_CHECKING:
    from vtoken.adapters.base import Adapter

ITEM = "vtoken"
"""Key of the record inside the output of ``get_image_features``."""


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
    """

    lengths: list[int]
    layouts: list[ItemLayout]
    maps: dict[EncoderRead, Tensor]
    projector_input: Tensor | None = None


def feature_list(output: Any) -> list[Tensor]:
    """The per-item features (N_i, D) of a ``get_image_features`` output, whatever the transformers version."""
    features = getattr(output, "pooler_output", output)
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
    """

    def __init__(self, adapter: Adapter, reads: Sequence[EncoderRead], projector: bool) -> None:
        self.adapter, self.reads, self.projector = adapter, list(reads), projector
        self.busy, self.thread = False, 0

    def __call__(self, original: Callable, modality: str, *args: Any, **kwargs: Any) -> Any:
        if self.busy:  # Qwen3-VL: get_video_features calls get_image_features
            return original(*args, **kwargs)
        output, seen, inputs = self.observe(lambda: original(*args, **kwargs))
        bound = inspect.signature(original).bind_partial(*args, **kwargs)
        call = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        record = self._record(output, modality, call, seen, inputs)
        if hasattr(output, "pooler_output"):
            output[ITEM] = record
        return output, record

    def observe(self, run: Callable) -> tuple[Any, dict[EncoderRead, list[Tensor]], list[Tensor]]:
        """Call ``run`` with the taps open: its result, the statistics and the projector's inputs, per call of each."""
        seen: dict[EncoderRead, list[Tensor]] = {read: [] for read in self.reads}
        inputs: list[Tensor] = []
        self.busy, self.thread = True, threading.get_ident()
        try:
            with contextlib.ExitStack() as stack:
                self._open_taps(stack, seen)
                if self.projector:
                    hook = self.adapter.projector.register_forward_pre_hook(lambda m, a: inputs.append(a[0].detach()))
                    stack.callback(hook.remove)
                output = run()
        finally:
            self.busy = False
        if not all(seen.values()):
            raise ValueError(
                f"The vision tower of {type(self.adapter.model).__name__} computes its attention with code of its own, "
                "which cannot be read: use a reducer that needs no encoder attention."
            )
        return output, seen, inputs

    def _open_taps(self, stack: contextlib.ExitStack, seen: dict[EncoderRead, list[Tensor]]) -> None:
        first = self.adapter.leading_tokens
        block = self.adapter.tower_block
        for layer in {block(read.layer) for read in self.reads}:
            reads = [read for read in self.reads if block(read.layer) == layer]

            def read_all(
                module: nn.Module, q: Tensor, k: Tensor, mask: Any, kwargs: Any, reads: list[EncoderRead] = reads
            ) -> None:
                if mask is not None:
                    raise ValueError(
                        "The vision tower masks its attention (pictures of unequal size in one batch), and encoder "
                        "statistics are defined without a mask: use a reducer that needs no encoder attention."
                    )
                scale = kwargs.get("scaling") or q.shape[-1] ** -0.5
                for read in reads:
                    what = read.resolve(first > 0).what
                    seen[read].append(STATISTICS[what](q, k, scale, first))

            stack.enter_context(self.adapter.tap_tower(layer, read_all))

    def _record(
        self, output: Any, modality: str, call: dict, seen: dict[EncoderRead, list[Tensor]], inputs: list[Tensor]
    ) -> VisionRecord:
        lengths = self.adapter.item_lengths(feature_list(output))
        layouts = self.adapter.layouts(modality, call, lengths)
        with torch.no_grad():
            maps = {read: self._pack(found, modality, call) for read, found in seen.items()}
            before = self.adapter.pack_projector_input(inputs, modality, call) if inputs else None
        for found in (*maps.values(), *([before] if before is not None else [])):
            if len(found) != sum(lengths):
                raise RuntimeError(
                    f"The {type(self.adapter).__name__} adapter mapped the encoder to {len(found)} values "
                    f"for {sum(lengths)} visual tokens: its packing does not fit this model; please report it."
                )
        return VisionRecord(lengths, layouts, maps, before)

    def _pack(self, parts: list[Tensor], modality: str, call: dict) -> Tensor:
        scalar = parts[0].dim() == 2
        packed = self.adapter.pack([part[..., None] if scalar else part for part in parts], modality, call)
        return packed[..., 0] if scalar else packed


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
            f"The prompt has {sum(counts)} visual tokens for {total} encoded ones: this transformers version adds "
            "tokens after encoding, which cannot be placed. Use a newer transformers (LLaVA-OneVision clips need one)."
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
