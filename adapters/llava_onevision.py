# SPDX-License-Identifier: Apache-2.0
"""LLaVA-OneVision: LLaVA-NeXT's packing, coarser above a limit; several images, and frames, get one view each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtoken.adapters.base import equal_views
from vtoken.adapters.llava_next import LlavaNextAdapter
from vtoken.compat import clip_pixels
from vtoken.context import ItemLayout


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """`transformers.LlavaOnevisionForConditionalGeneration`."""

    model_types = ("llava_onevision",)

    def _view_counts(self, call: dict[str, Any]) -> list[int]:
        sizes, rows = call["image_sizes"], call.get("batch_num_images")
        alone = [True] * len(sizes) if rows is None else [n == 1 for n in rows for _ in range(n)]
        return [self._views(size) if single else 1 for size, single in zip(sizes, alone, strict=True)]

    def _pack_views(self, views: list[Tensor], sizes: Tensor, call: dict[str, Any]) -> list[Tensor]:
        newline = torch.full((views[0].shape[-1],), float("nan"), dtype=torch.float32, device=views[0].device)
        ratio = call.get("vision_aspect_ratio") or self.model.config.vision_aspect_ratio
        return list(self.outer.pack_image_features(views, sizes, newline, vision_aspect_ratio=ratio)[0])

    def tower_groups(self, patches: int, modality: str) -> Tensor:
        if modality == "video":
            raise ValueError(
                "LLaVA-OneVision interpolates the frames of a clip after the tower, so that a token comes from several "
                "patches: use a reducer that acts before the language model for clips."
            )
        return super().tower_groups(patches, modality)

    def pack(self, parts: list[Tensor], modality: str, call: dict[str, Any]) -> Tensor:
        if modality == "image":
            return super().pack(parts, modality, call)
        clips = len(clip_pixels(call))
        frames = self.outer.apply_pooling(torch.cat(parts).float())
        clip = frames.reshape(clips, -1, frames.shape[-1])
        newline = torch.full_like(clip[:, :1], float("nan"))
        return torch.cat([clip, newline], 1).flatten(0, 1)

    def layouts(self, modality: str, call: dict[str, Any], lengths: list[int]) -> list[ItemLayout]:
        if modality == "image":
            return super().layouts(modality, call, lengths)
        clips, frames = clip_pixels(call).shape[:2]
        side = (self.side + 1) // 2
        return [equal_views(frames, side, side, newlines=1)] * clips
