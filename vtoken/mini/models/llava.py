# SPDX-License-Identifier: Apache-2.0
"""``mini-llava``: one picture of 168 x 168 pixels, 12 x 12 tokens; the other models start from its weights."""

from __future__ import annotations

from vtoken.mini.model import WIDTH, build_model, build_processor
from vtoken.mini.models.base import Architecture, Places, grid_places
from vtoken.mini.world import PATCH


def places(width: int, height: int, video: bool = False) -> Places:
    """The patches of the picture."""
    return grid_places(height // PATCH, width // PATCH, (0, 0, width, height))


ARCHITECTURE = Architecture(
    name="mini-llava",
    build_model=build_model,
    build_processor=build_processor,
    places=places,
    tower="vision_tower",
    tower_width=WIDTH,
    cls_layers="vision_tower.encoder.layers",
    steps={"decoder": 2500, "binding": 1500, "tower": 4000, "align": 600, "joint": 1500},
)
