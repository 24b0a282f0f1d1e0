# SPDX-License-Identifier: Apache-2.0
"""What lies under each visual token of a document: the dense supervision of the vision tower."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vtoken.mini.models.base import Places
from vtoken.mini.world import CHARACTERS, COLORS, LETTERS, MAX_LETTERS, MOTIONS, PATCH, SHAPES, Item, Scene

IGNORE = -100
POSITIONS = 18  # rows or columns of tokens, at most
FIELDS = {
    "kind": 5,  # background, shape, digit, letter, figure
    "color": len(COLORS),
    "shape": len(SHAPES),
    "digit": 10,
    "letter": len(CHARACTERS),
    "index": MAX_LETTERS,
    "center": 2,  # does the token hold the centre of its item?
    "row": POSITIONS,
    "column": POSITIONS,
    "part": 2,  # of a crop or tile rather than of the whole picture
    "motion": len(MOTIONS),
}
"""Field -> number of classes; a field that does not apply to a token is IGNORE there."""

_KINDS = {"shape": 1, "digit": 2, "letter": 3, "figure": 4}
_COLOR_IDS = {name: i for i, name in enumerate(COLORS)}
_SHAPE_IDS = {name: i for i, name in enumerate(SHAPES)}
_MOTION_IDS = {name: i for i, name in enumerate(MOTIONS)}
_MIN_OVERLAP = 0.3  # of the token or of the item, whichever is smaller
_ANY_OVERLAP = 0.05  # between the two a token is neither: it is left out of the loss


def _overlap(box: tuple[float, float, float, float], boxes: np.ndarray) -> np.ndarray:
    """(N,) area shared by each token and a box, relative to the smaller of the two."""
    x0, y0, x1, y1 = box
    width = np.clip(np.minimum(boxes[:, 2], x1) - np.maximum(boxes[:, 0], x0), 0, None)
    height = np.clip(np.minimum(boxes[:, 3], y1) - np.maximum(boxes[:, 1], y0), 0, None)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return height * width / np.minimum(area, (x1 - x0) * (y1 - y0)).clip(1e-9)


def _holds_center(box: tuple[float, float, float, float], boxes: np.ndarray) -> np.ndarray:
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return (boxes[:, 0] <= x) & (x < boxes[:, 2]) & (boxes[:, 1] <= y) & (y < boxes[:, 3])


def box_tokens(box: tuple[float, float, float, float], picture: int, places: Places) -> np.ndarray:
    """(N,) bool: the tokens of whole pictures that show what is in a box."""
    shown = (_overlap(box, places.boxes) >= _MIN_OVERLAP) | _holds_center(box, places.boxes)
    return shown & (places.picture == picture) & ~places.part


def center_token(box: tuple[float, float, float, float], picture: int, places: Places) -> int:
    """The token of a whole picture that holds the centre of a box."""
    return int(np.argmax(_holds_center(box, places.boxes) & (places.picture == picture) & ~places.part))


def legible_token(box: tuple[float, float, float, float], places: Places) -> np.ndarray:
    """(N,) bool: the token of the finest views that holds the centre of a box of text."""
    size = np.where(places.view < 0, np.inf, (places.boxes[:, 2:] - places.boxes[:, :2]).max(1))
    return _holds_center(box, places.boxes) & (size <= size.min() + 1e-6)


def _values(item: Item) -> dict[str, int]:
    values = {"color": _COLOR_IDS.get(item.color, IGNORE), "shape": _SHAPE_IDS.get(item.shape, IGNORE)}
    values["motion"] = _MOTION_IDS.get(item.motion, IGNORE)
    if item.kind == "digit":
        values["digit"] = item.value
    elif item.kind in ("letter", "figure"):
        values |= {"letter": item.value, "index": item.index}
    return values


def token_labels(scenes: Sequence[Scene], places: Places) -> dict[str, np.ndarray]:
    """Field -> (N,) int64 class of every visual token; ``scenes`` are the pictures that ``places`` numbers."""
    count = len(places.boxes)
    out = {name: np.full(count, IGNORE) for name in FIELDS}
    size = places.boxes[:, 2:] - places.boxes[:, :2]
    token, legible = size.min(1) > 0, size.max(1) <= PATCH + 1e-6
    out["kind"][token] = 0
    out["row"], out["column"] = np.where(token, places.row, IGNORE), np.where(token, places.column, IGNORE)
    if places.part.any():
        out["part"] = np.where(token, places.part, IGNORE)
    for picture, scene in enumerate(scenes):
        here = places.picture == picture
        for item in scene.items:
            if item.kind == "stroke":
                continue
            overlap = _overlap(item.box, places.boxes) * here
            center = _holds_center(item.box, places.boxes) & here
            covered = (overlap >= _MIN_OVERLAP) | center
            out["kind"][(overlap > _ANY_OVERLAP) & ~covered & (out["kind"] <= 0)] = IGNORE
            out["kind"][covered] = _KINDS[item.kind]
            out["center"][covered] = center[covered]
            values = _values(item)
            for name in ("color", "shape", "digit", "letter", "index", "motion"):
                out[name][covered] = values.get(name, IGNORE)
    for name in ("letter", "index", "center"):  # several letters share a token of a thumbnail
        out[name][~legible & np.isin(out["kind"], (3, 4))] = IGNORE
    return {name: field.astype(np.int64) for name, field in out.items()}


def picture_labels(scene: Scene) -> np.ndarray:
    """(36 + 10 + 26,) float32 multi-label target of a [CLS] token: which pairs, digits and letters are shown."""
    pairs, digits = np.zeros((len(COLORS), len(SHAPES))), np.zeros(10)
    letters = np.zeros(len(LETTERS))
    for item in scene.items:
        if item.kind == "shape":
            pairs[_COLOR_IDS[item.color], _SHAPE_IDS[item.shape]] = 1
        elif item.kind == "digit":
            digits[item.value] = 1
        elif item.kind == "letter":
            letters[item.value] = 1
    return np.concatenate([pairs.reshape(-1), digits, letters]).astype(np.float32)


PICTURE_LABELS = len(COLORS) * len(SHAPES) + 10 + len(LETTERS)
