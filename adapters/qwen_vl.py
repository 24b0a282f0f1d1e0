# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL, Qwen2.5-VL and Qwen3.5: packed towers in which 2 x 2 patches, neighbours in the sequence, are a token."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtoken.adapters.base import Adapter, equal_views, resize
from vtoken.compat import vision_window_index
from vtoken.context import ItemLayout

CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""``image_std`` of the processors of Qwen2-VL and Qwen2.5-VL."""
HALF_STD = (0.5, 0.5, 0.5)
"""That of the later ones."""


class _TokenMerger(nn.Module):
    """The merger on rows that hold the patches of one token side by side."""

    def __init__(self, merger: nn.Module, width: int) -> None:
        super().__init__()
        self.merger, self.width = merger, width

    def forward(self, x: Tensor) -> Tensor:
        return self.merger(x.reshape(-1, self.width))


class QwenVLAdapter(Adapter):
    """`transformers.Qwen2VLForConditionalGeneration`, `Qwen2_5_VLForConditionalGeneration` and Qwen3.5."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe")

    @property
    def merge(self) -> int:
        """Patches per token and axis."""
        return self.tower.spatial_merge_size

    @property
    def token_projector(self) -> nn.Module:
        first = next(module for module in self.projector.modules() if isinstance(module, nn.Linear))
        return _TokenMerger(self.projector, first.in_features // self.merge**2)

    # ------------------------------------------------------------------ rows of the packed tower
    @property
    def tower_mergers(self) -> list[nn.Module]:
        return [self.tower.merger, *getattr(self.tower, "deepstack_merger_list", ())]

    @property
    def tower_exits(self) -> tuple[int, ...]:
        return tuple(sorted({*getattr(self.tower, "deepstack_visual_indexes", ()), len(self.tower_blocks) - 1}))

    @staticmethod
    def _tower_input(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Pixels (L, D) and grids (I, 3) of a call of the tower."""
        given = dict(zip(("hidden_states", "grid_thw"), args, strict=False)) | kwargs
        return given["hidden_states"], given["grid_thw"]

    def tower_pictures(self, args: tuple, kwargs: dict[str, Any], std: tuple[float, ...] | None) -> list[Tensor]:
        pixels, grids = self._tower_input(args, kwargs)
        vision = self.model.config.vision_config
        channels = pixels.shape[1] // (vision.temporal_patch_size * vision.patch_size**2)
        if std is None:
            std = CLIP_STD if self.model.config.model_type.startswith("qwen2") else HALF_STD
        if len(std) != channels:
            raise ValueError(
                f"std={std} has {len(std)} numbers for pictures of {channels} channels: give one for each channel."
            )
        scale = torch.tensor(std, dtype=torch.float32, device=pixels.device)[:, None]
        rows = (pixels.detach().float().unflatten(1, (channels, -1)) * scale).flatten(1)
        sizes, merge = grids.tolist(), self.merge
        parts = rows.split([t * h * w for t, h, w in sizes])
        return [part.reshape(t, h // merge, w // merge, -1) for part, (t, h, w) in zip(parts, sizes, strict=True)]

    def tower_order(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        pixels, grids = self._tower_input(args, kwargs)
        if not hasattr(self.tower, "window_size"):
            return torch.arange(len(pixels) // self.merge**2, device=pixels.device)
        return vision_window_index(self.tower, grids).to(pixels.device)

    def tower_items(self, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> list[int]:
        return self._tower_input(args, kwargs)[1].prod(1).tolist()

    def cut_block(self, args: tuple, kwargs: dict[str, Any], kept: Tensor) -> dict[str, Any]:
        """Rotary tables, and the bounds of pictures, frames or windows; a window that lost all its rows is gone."""
        bounds = kwargs["cu_seqlens"]
        before = torch.nn.functional.pad(kept.cumsum(0), (1, 0))  # rows that stay before each one
        short = before[bounds.to(kept.device).long()].unique_consecutive()
        tables = tuple(table[kept] for table in kwargs["position_embeddings"])
        return {**kwargs, "cu_seqlens": short.to(bounds), "position_embeddings": tables}

    def pixels(self, layout: ItemLayout) -> tuple[int, int] | None:
        cell = self.model.config.vision_config.patch_size * self.merge
        rows, columns = layout.grids[0]
        return rows * cell, columns * cell

    def _token_order(self, rows: Tensor, modality: str, call: dict[str, Any]) -> Tensor:
        """Rows (T, ...) in the order of the tower to the order of the features: undoes the windows of Qwen2.5-VL."""
        if not hasattr(self.tower, "window_size"):
            return rows
        window = vision_window_index(self.tower, call[f"{modality}_grid_thw"])
        return rows[torch.argsort(window).to(rows.device)]

    def pack(self, parts: list[Tensor], modality: str, call: dict[str, Any]) -> Tensor:
        patches = torch.cat([part.flatten(0, 1) for part in parts])
        tokens = patches.unflatten(0, (-1, self.merge**2)).mean(1)
        return self._token_order(tokens, modality, call)

    def pack_projector_input(self, parts: list[Tensor], modality: str, call: dict[str, Any]) -> Tensor:
        tokens = torch.cat(parts).unflatten(0, (-1, self.merge**2)).flatten(1)
        return self._token_order(tokens, modality, call)

    def resampled(self, modality: str, call: dict[str, Any], grids: list[tuple[int, int]]) -> dict[str, Any]:
        if modality != "image":
            return super().resampled(modality, call, grids)
        merge, patch = self.merge, self.model.config.vision_config.patch_size
        sizes, parts = call["image_grid_thw"].tolist(), []
        for rows, (_, height, width), grid in zip(
            call["pixel_values"].split([t * h * w for t, h, w in sizes]), sizes, grids, strict=True
        ):
            cells = rows.view(height // merge, width // merge, merge, merge, -1, patch, patch)
            picture = cells.permute(4, 0, 2, 5, 1, 3, 6).reshape(1, -1, height * patch, width * patch)
            small = resize(picture, *(cells * merge * patch for cells in grid))[0]
            cells = small.view(-1, grid[0], merge, patch, grid[1], merge, patch).permute(1, 4, 2, 5, 0, 3, 6)
            parts.append(cells.reshape(-1, rows.shape[1]))
        shape = [[1, rows * merge, columns * merge] for rows, columns in grids]
        given = {name: value for name, value in call.items() if name != "kwargs"}
        grid_thw = call["image_grid_thw"].new_tensor(shape)
        return {**given, "pixel_values": torch.cat(parts), "image_grid_thw": grid_thw}

    def layouts(self, modality: str, call: dict[str, Any], lengths: list[int]) -> list[ItemLayout]:
        grids = call[f"{modality}_grid_thw"].tolist()
        return [equal_views(t, h // self.merge, w // self.merge) for t, h, w in grids]
