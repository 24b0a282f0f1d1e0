# SPDX-License-Identifier: Apache-2.0
"""Which part of which picture every visual token shows, and what a reducer did with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.adapters import Adapter, adapter_for
from vtoken.context import NEWLINE, VisualContext
from vtoken.engine.encode import encode, real_tokens
from vtoken.engine.prompt import build_context
from vtoken.engine.tower import VisionReader
from vtoken.stats import Stats
from vtoken.wrapping import session_of


@dataclass(frozen=True)
class TokenMap:
    """The T visual tokens of a batch, row by row in the order of the prompt.

    Parameters
    ----------
    row, position : Tensor
        (T,) long: batch row and index in ``input_ids``.
    image : Tensor
        (T,) long: number of the image or clip in the batch; clips come after all images.
    view : Tensor
        (T,) long: thumbnail, crop, tile or frame; -1 for a separator.
    box : Tensor
        (T, 4) float: x0, y0, x1, y1 in pixels of the picture (see `token_map`); NaN for a separator.
    sizes : list of (height, width)
        The pictures that the boxes refer to.
    kept : dict of int to Tensor
        First decoder layer of a cut -> (T,) bool, the tokens that are there from it on; empty before a wrapped run.
    merged : dict of int to Tensor
        Decoder layer of a cut that merged -> (T,) long, the index of the token each one was merged into, -1 for none.
    """

    row: Tensor
    position: Tensor
    image: Tensor
    view: Tensor
    box: Tensor
    sizes: list[tuple[int, int]]
    kept: dict[int, Tensor]
    merged: dict[int, Tensor]

    def __len__(self) -> int:
        return len(self.row)


@torch.no_grad()
def token_map(model: nn.Module, inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]] | None = None) -> TokenMap:
    """Map every visual token of a prompt to the pixels that it stands for.

    The pictures are encoded once. If the model is wrapped and its last prompt was this one, the map also says which
    tokens were kept and merged.

    Parameters
    ----------
    model : nn.Module
        A model that `vtoken.adapters` knows, wrapped or not.
    inputs : mapping
        What the model's processor returned.
    sizes : sequence of (height, width), optional
        Original sizes of the pictures. Without them boxes are in pixels of the original picture where the model is
        told its size (LLaVA-NeXT, LLaVA-OneVision), else of the picture as the processor handed it over. The picture
        is taken to be shown whole: where a processor crops (LLaVA-1.5), pass what is left of it.

    Returns
    -------
    TokenMap
        On the CPU.

    Raises
    ------
    ValueError
        If ``sizes`` are needed, or are of another number than the pictures.
    """
    adapter, session = adapter_for(model), session_of(model)
    _, records = encode(adapter, VisionReader(adapter, (), False), inputs)
    kinds = adapter.modality(inputs["input_ids"], None)
    blank = torch.zeros(*kinds.shape, 1, dtype=torch.float32, device=kinds.device)
    ctx = build_context(adapter, kinds, records, blank, real_tokens(inputs))
    found, boxes = _boxes(adapter, ctx, sizes)
    row, position = ctx.visual.nonzero().cpu().unbind(1)
    image, slot = ctx.item[ctx.visual].cpu(), ctx.slot[ctx.visual].cpu()
    marks = {modality: record.mark for modality, record in records.items() if record.mark is not None}
    last = None if session is None else session.stats
    if last is not None and not last.is_of({"input_ids": inputs["input_ids"], **marks}):
        last = None
    kept, merged = _history(last, ctx, image, slot)
    return TokenMap(row, position, image, ctx.view.cpu()[image, slot], boxes[image, slot], found, kept, merged)


def _boxes(
    adapter: Adapter, ctx: VisualContext, sizes: Sequence[tuple[int, int]] | None
) -> tuple[list[tuple[int, int]], Tensor]:
    """Picture sizes, and boxes (I, N, 4) in their pixels."""
    if sizes is not None and len(sizes) != ctx.items:
        raise ValueError(f"sizes has {len(sizes)} entries for {ctx.items} pictures: give one (height, width) for each.")
    found, boxes = [], []
    for item, layout in enumerate(ctx.layouts):
        given = layout.size if sizes is None else sizes[item]
        shares = adapter.shares(layout, given)
        size = given or adapter.pixels(layout)
        if size is None:
            raise ValueError(
                f"{type(adapter).__name__} does not know the size of a picture: pass sizes=[(height, width), ...]."
            )
        height, width = size
        box = shares * torch.tensor([width, height, width, height], device="cpu")
        boxes.append(box.masked_fill((layout.view == NEWLINE)[:, None], float("nan")))
        found.append((int(height), int(width)))
    return found, torch.nn.utils.rnn.pad_sequence(boxes, True, float("nan"))


def _history(
    stats: Stats | None, ctx: VisualContext, image: Tensor, slot: Tensor
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Kept and merged tokens of the last run, of this prompt; nothing without one."""
    if stats is None:
        return {}, {}
    number = torch.full((ctx.items, ctx.longest), -1, device="cpu")
    number[image, slot] = torch.arange(len(image), device="cpu")
    kept = {layer: mask.cpu()[image, slot] for layer, mask in stats.kept}
    merged = {}
    for layer, source in stats.sources:
        target = source.cpu()[image, slot]
        merged[layer] = torch.where(target < 0, -1, number[image, target.clamp(min=0)])
    return kept, merged
