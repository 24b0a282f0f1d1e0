# SPDX-License-Identifier: Apache-2.0
"""What differs between the supported transformers versions, outside of caches and masks (`vtoken.engine.cache`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

try:
    from transformers.vision_utils import get_vision_window_index
except ImportError:  # transformers < 5.10: a method of the tower
    get_vision_window_index = None  # type: ignore[assignment]


def vision_window_index(tower: Any, grids: Tensor) -> Tensor:
    """(T,) long: for each merged patch in the order of Qwen2.5-VL's windowed tower, its place in raster order."""
    if get_vision_window_index is None:
        return tower.get_window_index(grids)[0]
    return get_vision_window_index(grids, tower.spatial_merge_size, tower.window_size, tower.patch_size)[0]


def clip_pixels(call: dict[str, Any]) -> Tensor:
    """Pixels (clips, frames, ...) among the arguments of ``get_video_features``, whose name differs in old versions."""
    return call["pixel_values_videos"] if "pixel_values_videos" in call else call["pixel_values"]
