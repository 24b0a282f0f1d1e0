# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 and VipLLaVA: one view per image, one token per patch, from whatever tower the configuration names."""

from __future__ import annotations

import functools
import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtoken.adapters.base import Adapter, grid_shares, resize
from vtoken.context import NEWLINE, ItemLayout


class LlavaAdapter(Adapter):
    """`transformers.LlavaForConditionalGeneration` with a CLIP, SigLIP, DINO, ViT, AIMv2 or Pixtral tower.

    Nothing here depends on which of them it is. The model takes all tokens of the tower
    (``vision_feature_select_strategy="full"``) or leaves out the first (``"default"``), whatever that is. There may be

    - visual tokens that are no patch, as [CLS] with ``"full"`` and registers in any case: they can be kept or dropped
      like others and have statistics of their own, but no cell: their place is row 0, column 0 and their box is the
      whole picture;
    - a missing patch, as the first one of SigLIP with ``"default"``: its cell stays empty;
    - tokens of padding (SigLIP 2 in a batch), which are separators: they show nothing and go first.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava", "vipllava")

    @property
    def side(self) -> int:
        """Patches per axis of a view of the tower's own size."""
        vision = self.model.config.vision_config
        return one_number(vision.image_size) // self.patch

    @property
    def patch(self) -> int:
        """Pixels per patch and axis."""
        return one_number(self.model.config.vision_config.patch_size)

    def skipped_tokens(self, call: dict[str, Any]) -> int:
        named = call.get("vision_feature_select_strategy")
        named = named or getattr(self.model.config, "vision_feature_select_strategy", "default")  # VipLLaVA has none
        return int(named == "default")

    def pixels(self, layout: ItemLayout) -> tuple[int, int] | None:
        size = getattr(self.model.config.vision_config, "image_size", None)
        if size is not None and layout.grids[0] == (self.side, self.side):  # the border may hold no whole patch
            return one_number(size), one_number(size)
        rows, columns = layout.grids[0]
        return rows * self.patch, columns * self.patch

    def tower_groups(self, patches: int, modality: str) -> Tensor:
        if len(self.global_blocks) < len(self.tower_blocks):
            return super().tower_groups(patches, modality)
        return torch.arange(patches, device="cpu")

    def pack(self, parts: list[Tensor], modality: str, call: dict[str, Any]) -> Tensor:
        return torch.cat([part.flatten(0, 1) for part in parts])

    def pack_projector_input(self, parts: list[Tensor], modality: str, call: dict[str, Any]) -> Tensor:
        return self.pack(parts, modality, call)

    def resampled(self, modality: str, call: dict[str, Any], grids: list[tuple[int, int]]) -> dict[str, Any]:
        if modality != "image" or call["pixel_values"].dim() == 5:  # crops of a fixed size, in families built on this
            return super().resampled(modality, call, grids)
        names = inspect.signature(self.tower.forward).parameters
        self._check_resampling(call)
        given = {name: value for name, value in call.items() if name != "kwargs"}
        if "interpolate_pos_encoding" in names:
            given["interpolate_pos_encoding"] = True
        sizes = [(rows * self.patch, columns * self.patch) for rows, columns in grids]
        pictures = list(call["pixel_values"])
        if (shown := call.get("image_sizes")) is not None:  # the rest is padding
            pictures = [x[:, :height, :width] for x, (height, width) in zip(pictures, shown.tolist(), strict=True)]
            given["image_sizes"] = shown.new_tensor(sizes)
        small = [resize(x[None], *size)[0] for x, size in zip(pictures, sizes, strict=True)]
        high, wide = (max(axis) for axis in zip(*sizes, strict=True))
        padded = [torch.nn.functional.pad(x, (0, wide - x.shape[2], 0, high - x.shape[1])) for x in small]
        return {**given, "pixel_values": torch.stack(padded)}

    def _check_resampling(self, call: dict[str, Any]) -> None:
        """Raise ValueError unless a smaller picture gives the patches of a smaller grid."""
        tower, way_out = type(self.tower).__name__, "use the reducer 'pooled'."
        if "spatial_shapes" in call:
            raise ValueError(f"{tower} is handed lists of patches, which cannot be resized as a picture: {way_out}")
        if (skipped := self.skipped_tokens(call)) != self.leading_tokens:
            raise ValueError(
                f"The model leaves out the first {skipped} of the tokens of {tower}, of which the first "
                f"{self.leading_tokens} are no patches: its visual tokens are not the cells of a grid, so {way_out}"
            )
        moves = any(hasattr(part, "interpolate_pos_encoding") for part in self.tower.modules())
        if not moves and any("pos" in name for name, _ in self.tower.named_parameters()):
            raise ValueError(f"{tower} has position embeddings for one size of pictures only: {way_out}")

    def _patch_grids(self, call: dict[str, Any]) -> list[tuple[int, int]]:
        """(rows, columns) of patches of each picture."""
        if (shapes := call.get("spatial_shapes")) is not None:
            return [(int(rows), int(columns)) for rows, columns in shapes]
        if (sizes := call.get("image_sizes")) is not None:
            return [(int(height) // self.patch, int(width) // self.patch) for height, width in sizes]
        height, width = call["pixel_values"].shape[-2:]
        return [(height // self.patch, width // self.patch)] * len(call["pixel_values"])

    def item_lengths(self, features: list[Tensor], call: dict[str, Any]) -> list[int]:
        grids = self._patch_grids(call)
        if len(features) == 1 < len(grids):  # Pixtral without image_sizes: all pictures in one sequence
            return [rows * columns for rows, columns in grids]
        return super().item_lengths(features, call)

    def layouts(self, modality: str, call: dict[str, Any], lengths: list[int]) -> list[ItemLayout]:
        spare = self.leading_tokens - self.skipped_tokens(call)  # below 0: patches that are left out
        padded = call.get("spatial_shapes") is not None
        out = []
        for (rows, columns), length in zip(self._patch_grids(call), lengths, strict=True):
            padding = length - rows * columns - spare
            if padding < 0 or (padding and not padded):
                raise RuntimeError(
                    f"A picture of {rows} x {columns} patches became {length} visual tokens, where "
                    f"{rows * columns + spare} are expected: {type(self.tower).__name__} has tokens before its patches "
                    "that were not recognised; please report it."
                )
            out.append(patch_layout(rows, columns, spare, padding))
        return out


@functools.lru_cache(maxsize=64)
@torch.inference_mode(mode=False)  # a cached tensor may be an index in a pass that keeps gradients
def patch_layout(rows: int, columns: int, spare: int, padding: int) -> ItemLayout:
    """One grid of patches in raster order, ``spare`` tokens without a cell before it and ``padding`` after it.

    Below 0, ``spare`` is how many of the first patches are left out.
    """
    index = torch.arange(max(-spare, 0), rows * columns, device="cpu")
    before, after = (torch.zeros(max(count, 0), dtype=torch.long, device="cpu") for count in (spare, padding))
    row, column = (torch.cat([before, place, after]) for place in (index // columns, index % columns))

    def box() -> Tensor:
        shares = grid_shares(row, column, rows, columns)
        shares[: len(before)] = torch.tensor([0.0, 0.0, 1.0, 1.0], device="cpu")
        return shares

    view = torch.cat([before, torch.zeros_like(index), after + NEWLINE])
    return ItemLayout(view, row, column, ((rows, columns),), box=box if spare > 0 else None)


def one_number(size: Any) -> int:
    """The side of a square that a configuration gives as a number or as a pair."""
    return size if isinstance(size, int) else size[0]
