# SPDX-License-Identifier: Apache-2.0
"""What the last prefill of a wrapped model did."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtoken.context import Cut
from vtoken.light import LightLayer


@dataclass(frozen=True)
class ImageStats:
    """Tokens of one image or clip: its batch row, how many it had, how many entered and how many left the decoder."""

    row: int
    tokens: int
    kept: int
    kept_last: int


@dataclass
class Stats:
    """Token counts of the last prefill; nothing is copied from the device before it is asked for.

    Parameters
    ----------
    tokens, rows : Tensor
        (I,) long: visual tokens and batch row of each image.
    depth : int
        Decoder layers.
    prompt : mapping
        What tells the prompt from others: its ``input_ids``, and numbers of its pixels by modality.
    reducer : str
        Name and parameters of the reducer.
    """

    tokens: Tensor
    rows: Tensor
    depth: int
    prompt: Mapping[str, Tensor] = field(default_factory=dict)
    reducer: str = ""
    selection_seconds: float = 0.0
    """Host time spent in the session before the language model and at layers (kernels may still run on a GPU)."""
    sources: list[tuple[int, Tensor]] = field(default_factory=list)
    """(layer, (I, N) long: the slot each token was merged into, -1 for none) for every cut that merged."""
    light: dict[int, LightLayer] = field(default_factory=dict)
    """Decoder layers in which visual tokens compute less, and what they still compute there."""
    from_tower: Tensor | None = None
    """(I,) long: tokens of each image that the vision tower left; None if nothing was dropped inside of it."""
    patches: tuple[int, int] | None = None
    """Patches of all pictures, and those that the later blocks of the vision tower computed; None if all were."""
    _groups: list[tuple[int, Tensor]] = field(default_factory=list)

    def add_group(self, layer: int, left: Tensor, cut: Cut | None) -> None:
        """Remember which tokens (I, N) of each image are left from ``layer`` on."""
        self._groups.append((layer, left))
        if cut is not None and cut.source is not None:
            self.sources.append((layer, cut.source))

    def is_of(self, prompt: Mapping[str, Tensor]) -> bool:
        """Whether the last prefill was of such a `prompt`."""
        same = (torch.equal(value.cpu(), prompt[name].cpu()) for name, value in self.prompt.items() if name in prompt)
        return bool(self.prompt) and {*self.prompt} <= {*prompt} and all(same)

    @property
    def kept(self) -> list[tuple[int, Tensor]]:
        """(first layer, (I, N) bool of the tokens that are there from it on) for every cut."""
        return list(self._groups)

    @property
    def images(self) -> list[ImageStats]:
        """One entry per image, in the order of the batch."""
        first, last = (kept.sum(1).tolist() for _, kept in (self._groups[0], self._groups[-1]))
        columns = self.rows.tolist(), self.tokens.tolist(), first, last
        return [ImageStats(*values) for values in zip(*columns, strict=True)]

    @property
    def layers(self) -> list[tuple[int, list[int]]]:
        """(first layer, visual tokens of each image from there on) for every cut."""
        return [(layer, kept.sum(1).tolist()) for layer, kept in self._groups]

    @property
    def tokens_in(self) -> int:
        """Visual tokens that the prompt had."""
        return int(self.tokens.sum())

    @property
    def tokens_kept(self) -> int:
        """Visual tokens that entered the language model."""
        return int(self._groups[0][1].sum())

    @property
    def tokens_per_layer(self) -> float:
        """Visual tokens averaged over the decoder layers."""
        return sum(self.by_layer) / self.depth

    @property
    def by_layer(self) -> tuple[int, ...]:
        """Visual tokens of all images in each decoder layer."""
        ends = [layer for layer, _ in self._groups[1:]] + [self.depth]
        parts = ((end - layer) * [int(kept.sum())] for (layer, kept), end in zip(self._groups, ends, strict=True))
        return tuple(itertools.chain.from_iterable(parts))

    def __str__(self) -> str:
        steps = ", ".join(f"layer {layer}: {sum(kept)}" for layer, kept in self.layers)
        if self.from_tower is not None:
            steps = f"{int(self.from_tower.sum())} from the tower, {steps}"
        if self.patches is not None:
            steps = f"{self.patches[1]} of {self.patches[0]} patches, {steps}"
        if self.light:
            steps += f"; light layers: {', '.join(map(str, sorted(self.light)))}"
        return f"{self.tokens_in} visual tokens -> {steps} ({self.selection_seconds * 1e3:.1f} ms to select)"
