# SPDX-License-Identifier: Apache-2.0
"""What lies under each patch of a scene: the dense supervision of the vision tower."""

from __future__ import annotations

import numpy as np

from vtoken.mini.world import COLORS, GRID, LETTERS, MAX_LETTERS, PATCH, SHAPES, Scene

IGNORE = -100
FIELDS = {
    "kind": 4,  # background, shape, digit, letter
    "color": len(COLORS),
    "shape": len(SHAPES),
    "digit": 10,
    "letter": len(LETTERS),
    "index": MAX_LETTERS,
    "center": 2,  # does the patch hold the centre of its item?
    "row": GRID,
    "column": GRID,
}
"""Field -> number of classes; a field that does not apply to a patch is IGNORE there."""

_KINDS = {"shape": 1, "digit": 2, "letter": 3}
_COLOR_IDS = {name: i for i, name in enumerate(COLORS)}
_SHAPE_IDS = {name: i for i, name in enumerate(SHAPES)}
_MIN_OVERLAP = 0.3  # of the patch or of the item, whichever is smaller
_ANY_OVERLAP = 0.05  # between the two a patch is neither: it is left out of the loss


def _overlap(box: tuple[float, float, float, float]) -> np.ndarray:
    """(GRID, GRID) area shared by each patch and a box, relative to the smaller of the two."""
    x0, y0, x1, y1 = box
    edge = np.arange(GRID) * PATCH
    width = np.clip(np.minimum(edge + PATCH, x1) - np.maximum(edge, x0), 0, None)
    height = np.clip(np.minimum(edge + PATCH, y1) - np.maximum(edge, y0), 0, None)
    return height[:, None] * width[None] / min(PATCH**2, (x1 - x0) * (y1 - y0))


def box_patches(box: tuple[float, float, float, float]) -> np.ndarray:
    """(GRID * GRID,) bool: the patches that show what is in a box."""
    return (_overlap(box) >= _MIN_OVERLAP).reshape(-1)


def center_patch(box: tuple[float, float, float, float]) -> int:
    """Raster index of the patch that holds the centre of a box."""
    x0, y0, x1, y1 = box
    return int((y0 + y1) / 2 // PATCH) * GRID + int((x0 + x1) / 2 // PATCH)


def patch_labels(scene: Scene) -> dict[str, np.ndarray]:
    """Field -> (GRID * GRID,) int64 class of every patch in raster order."""
    out = {name: np.full((GRID, GRID), IGNORE) for name in FIELDS}
    out["kind"][:] = 0
    out["row"][:], out["column"][:] = np.arange(GRID)[:, None], np.arange(GRID)[None]
    for item in scene.items:
        overlap = _overlap(item.box)
        center = divmod(center_patch(item.box), GRID)
        covered = overlap >= _MIN_OVERLAP
        covered[center] = True
        out["kind"][(overlap > _ANY_OVERLAP) & ~covered & (out["kind"] <= 0)] = IGNORE
        out["kind"][covered] = _KINDS[item.kind]
        out["center"][covered] = 0
        out["center"][center] = 1
        values = {"color": _COLOR_IDS.get(item.color, IGNORE), "shape": _SHAPE_IDS.get(item.shape, IGNORE)}
        if item.kind != "shape":
            values[item.kind] = item.value
        if item.kind == "letter":
            values["index"] = item.index
        for name in ("color", "shape", "digit", "letter", "index"):
            out[name][covered] = values.get(name, IGNORE)
    return {name: field.reshape(-1).astype(np.int64) for name, field in out.items()}


def picture_labels(scene: Scene) -> np.ndarray:
    """(36 + 10 + 26,) float32 multi-label target of the [CLS] token: which pairs, digits and letters are shown."""
    pairs, digits = np.zeros((len(COLORS), len(SHAPES))), np.zeros(10)
    letters = np.zeros(len(LETTERS))
    for item in scene.items:
        if item.kind == "shape":
            pairs[_COLOR_IDS[item.color], _SHAPE_IDS[item.shape]] = 1
        elif item.kind == "digit":
            digits[item.value] = 1
        else:
            letters[item.value] = 1
    return np.concatenate([pairs.reshape(-1), digits, letters]).astype(np.float32)


PICTURE_LABELS = len(COLORS) * len(SHAPES) + 10 + len(LETTERS)
