# SPDX-License-Identifier: Apache-2.0
"""What a vision tower shows of itself: the tokens before its patches, and which of its blocks attend in windows.

Owns the conventions by which towers of transformers, and of code outside of it, name these things. It knows no family:
a family has any tower that its configuration names.
"""

from __future__ import annotations

from typing import Any

from torch import nn

GLOBAL_LISTS = ("fullatt_block_indexes", "global_attn_indexes")
"""Numbers of the blocks that attend to the whole picture (Qwen2.5-VL, SAM)."""
WINDOW_LISTS = ("window_block_indices",)
"""Numbers of the blocks that attend in windows (ViTDet)."""
LOCAL_TYPES = ("sliding", "window", "chunked", "local")
"""What a local block has in its name in ``layer_types``."""


def leading_tokens(tower: nn.Module) -> int:
    """Learnt tokens that the embeddings of a tower put before the patches: [CLS], registers.

    They are parameters beside the patch projection. A token elsewhere is another thing: AIMv2's pooling head has a
    [CLS] token of its own, which the blocks never see.
    """
    return sum(
        parameter.shape[-2] if parameter.dim() > 1 else 1
        for module in tower.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if _is_token(name) and _projects_patches(module)
    )


def _is_token(name: str) -> bool:
    return name.endswith(("token", "tokens", "class_embedding")) and "mask" not in name  # nor one that hides patches


def _projects_patches(module: nn.Module) -> bool:
    return any(isinstance(part, (nn.Conv2d, nn.Conv3d)) or "patch" in name for name, part in module.named_modules())


def global_blocks(tower: Any, blocks: nn.ModuleList) -> tuple[int, ...]:
    """Numbers of the ``blocks`` of a tower in which a patch attends to its whole picture (or frame).

    Towers say it by a list of numbers, by a type for each block, or by a window size at the block.
    """
    numbers = range(len(blocks))
    for place in (tower, getattr(tower, "config", None)):
        for name in GLOBAL_LISTS:
            if (listed := getattr(place, name, None)) is not None:
                return tuple(n for n in numbers if n in listed)
        for name in WINDOW_LISTS:
            if (listed := getattr(place, name, None)) is not None:
                return tuple(n for n in numbers if n not in listed)
        types = getattr(place, "layer_types", None)
        if types is not None and len(types) == len(blocks):
            return tuple(n for n in numbers if not any(part in types[n] for part in LOCAL_TYPES))
    return tuple(n for n in numbers if not getattr(blocks[n], "window_size", 0))
