# SPDX-License-Identifier: Apache-2.0
"""InternVL's chat models with remote code, recognised by their methods; nothing is imported.

They build ``inputs_embeds`` from ``extract_feature`` and call ``language_model.generate``. Their vision tower does not
dispatch its attention, so its fused projection is read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtoken.adapters.base import Adapter, equal_views, square_groups, square_side
from vtoken.adapters.internvl import join_tiles, tile_shares
from vtoken.context import ItemLayout
from vtoken.engine.taps import Reader, tap_fused
from vtoken.engine.tower import VisionRecord, feature_list

if TYPE_CHECKING:
    from vtoken.engine.hooks import AdapterHooks


class InternVLChatAdapter(Adapter):
    """``InternVLChatModel``."""

    leading_tokens = 1

    def __init__(self, model: Any) -> None:
        self.model, self.generator = model, model.language_model
        self.outer = None
        self.language_model = model.language_model.model
        self.layers = self.language_model.layers

    @staticmethod
    def serves(model: nn.Module) -> bool:
        """Whether the model has the methods of the family."""
        return hasattr(model, "extract_feature") and hasattr(model, "language_model")

    @property
    def tower(self) -> Any:
        return self.model.vision_model

    @property
    def projector(self) -> nn.Module:
        return self.model.mlp1

    def tap_tower(self, layer: int, reader: Reader) -> AbstractContextManager[None]:
        return tap_fused(self.vision_attention(layer), reader)

    def pack(self, parts: list[Tensor], modality: str, call: dict[str, Any]) -> Tensor:
        values = torch.cat(parts).float()
        side = square_side(values.shape[1])
        shuffled = self.model.pixel_shuffle(values.unflatten(1, (side, side)), self.model.downsample_ratio)
        return shuffled.flatten(0, 2).unflatten(1, (-1, values.shape[2])).mean(1)

    def tower_groups(self, patches: int, modality: str) -> Tensor:
        return square_groups(patches, round(1 / self.model.downsample_ratio))

    def pack_projector_input(self, parts: list[Tensor], modality: str, call: dict[str, Any]) -> Tensor:
        return torch.cat(parts).flatten(0, 1)

    def layouts(self, modality: str, call: dict[str, Any], lengths: list[int]) -> list[ItemLayout]:
        return [equal_views(1, square_side(length), square_side(length)) for length in lengths]

    def shares(self, layout: ItemLayout, size: tuple[int, int] | None) -> Tensor:
        return tile_shares(layout, size)

    def regroup(self, record: VisionRecord, here: Tensor) -> VisionRecord:
        return join_tiles(record, here, square_side(record.lengths[0]))

    def install(self, hooks: AdapterHooks) -> None:
        said: dict[str, Tensor | None] = {"prompt": None, "labels": None}  # by the call that is under way

        def note(original: Callable) -> Callable:
            def run(pixel_values: Any = None, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
                said.update(prompt=None if pixel_values is None else input_ids, labels=kwargs.get("labels"))
                try:
                    return original(pixel_values, input_ids, *args, **kwargs)
                finally:
                    said.update(prompt=None, labels=None)

            return run

        def encode(original: Callable) -> Callable:
            def run(*args: Any, **kwargs: Any) -> Any:
                output, record = hooks.reader(original, "image", *args, **kwargs)
                if (prompt := said["prompt"]) is not None:
                    kinds = (prompt == self.model.img_context_token_id).long()
                    hooks.announce(kinds, record, feature_list(output)[0][0], said["labels"])
                return output

            return functools.wraps(original)(run)

        hooks.replace(self.model, "generate", note)
        hooks.replace(self.model, "forward", note)
        hooks.replace(self.model, "extract_feature", encode)
