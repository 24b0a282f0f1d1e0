# SPDX-License-Identifier: Apache-2.0
"""What the vision tower gives, and what it is taught besides the dense labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vtoken.mini.model import WIDTH
from vtoken.mini.training.batches import Batch
from vtoken.mini.training.labels import IGNORE, PICTURE_LABELS
from vtoken.mini.world import COLORS, LETTERS, SHAPES


def encode(model: Any, pixels: dict[str, torch.Tensor], size: int) -> torch.Tensor:
    """(B, N, WIDTH) visual tokens, as they enter the language model."""
    encoder = model.model.get_video_features if "pixel_values_videos" in pixels else model.model.get_image_features
    found: Sequence[torch.Tensor] = encoder(**pixels, return_dict=True).pooler_output
    return torch.cat([part.reshape(-1, WIDTH) for part in found]).view(size, -1, WIDTH)


class ClsStates:
    """Records [CLS] of the last two layers of a tower."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.states: list[torch.Tensor] = []
        self._handles = [layer.register_forward_hook(self._record) for layer in layers[-2:]]

    def _record(self, module: nn.Module, args: Any, out: Any) -> None:
        self.states.append((out[0] if isinstance(out, tuple) else out)[:, 0])

    def close(self) -> None:
        """Record no more: what is never taken would keep every step's graph alive."""
        for handle in self._handles:
            handle.remove()

    def take(self) -> list[torch.Tensor]:
        """What was recorded since the last call."""
        states, self.states = self.states, []
        return states


def view_labels(batch: Batch) -> torch.Tensor:
    """(B * views, PICTURE_LABELS) what each crop, tile or picture shows, in the order of the tower."""
    pair = batch.labels["color"] * len(SHAPES) + batch.labels["shape"]
    digit = batch.labels["digit"] + len(COLORS) * len(SHAPES)
    letter = batch.labels["letter"] + len(COLORS) * len(SHAPES) + 10
    shown = [
        (pair, batch.labels["shape"] != IGNORE),
        (digit, batch.labels["digit"] != IGNORE),
        (letter, (batch.labels["letter"] != IGNORE) & (batch.labels["letter"] < len(LETTERS))),
    ]
    views = torch.from_numpy(batch.places.view)
    count = int(views.max()) + 1
    out = torch.zeros(len(batch.scenes), count, PICTURE_LABELS)
    for label, known in shown:
        document, token = known.nonzero().unbind(1)
        out[document, views[token], label[document, token]] = 1
    return out.flatten(0, 1)
