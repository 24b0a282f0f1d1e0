# SPDX-License-Identifier: Apache-2.0
"""The picture world of the embedded models: scenes of coloured shapes, handwritten digits and rendered words.

Everything is drawn with numpy alone, so that a seed gives the same pixels on every machine.

    rng = np.random.default_rng([Split.TEST, 7])
    scene = sample_scene(rng)
    image = render(scene, rng)              # uint8 (168, 168, 3)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from vtoken.mini.glyphs import GLYPHS

VERSION = 1  # of the generator: any change of pixels, scenes or questions must raise it

PATCH = 14
GRID = 12
IMAGE = PATCH * GRID
CELL = 3 * PATCH  # scenes are laid out on 4 x 4 cells, one item a cell, a word takes two
CELLS = IMAGE // CELL

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 225),
    "yellow": (235, 215, 50),
    "purple": (160, 60, 190),
    "cyan": (60, 205, 215),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
MOTIONS = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHARACTERS = LETTERS + "0123456789"
MAX_LETTERS = 5
HELD_OUT_DIGITS = 360  # of scikit-learn's 1797 pictures, the last ones: never used in training


class Split(IntEnum):
    """First word of every random seed: scenes of one split never appear in another."""

    TRAIN = 0
    TEST = 1
    DEV = 2


@dataclass(frozen=True)
class Item:
    """One thing in a scene; ``x``, ``y`` is its centre and ``width``, ``height`` its size, in pixels."""

    kind: str  # "shape", "digit", "letter", "figure" (a printed numeral) or "stroke" (unreadable text of a page)
    x: float
    y: float
    width: float
    height: float
    color: str = ""
    shape: str = ""
    value: int = -1  # the digit, or the place in CHARACTERS
    index: int = -1  # the letter's place in its word
    picture: int = -1  # which handwritten picture shows the digit
    motion: str = ""  # of the frames of a video: one of MOTIONS

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) in pixels."""
        return (
            self.x - self.width / 2,
            self.y - self.height / 2,
            self.x + self.width / 2,
            self.y + self.height / 2,
        )

    @property
    def cell(self) -> tuple[int, int]:
        """(column, row) of the layout cell that holds the centre."""
        return int(self.x // CELL), int(self.y // CELL)


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    items: tuple[Item, ...]
    width: int = IMAGE
    height: int = IMAGE
    paper: bool = False  # a light page

    def of(self, kind: str) -> list[Item]:
        """The items of one kind, in drawing order."""
        return [item for item in self.items if item.kind == kind]

    @property
    def word(self) -> str:
        """The rendered word of the scene, "" if there is none."""
        return "".join(CHARACTERS[item.value] for item in self.of("letter"))

    @property
    def number(self) -> str:
        """The printed number of the scene, "" if there is none."""
        return "".join(CHARACTERS[item.value] for item in self.of("figure"))


@functools.cache
def digit_pictures() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits: pictures (1797, 8, 8) in [0, 1] and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images / 16.0, data.target


def _pick_picture(digit: int, held_out: bool, rng: np.random.Generator) -> int:
    classes = digit_pictures()[1]
    first, last = (len(classes) - HELD_OUT_DIGITS, len(classes)) if held_out else (0, len(classes) - HELD_OUT_DIGITS)
    return int(rng.choice(np.flatnonzero(classes[first:last] == digit)) + first)


def _jitter(cell: int, size: float, rng: np.random.Generator) -> float:
    room = (CELL - size) / 2 - 1
    return (cell + 0.5) * CELL + rng.uniform(-room, room)


def _shape(cell: tuple[int, int], color: str, shape: str, rng: np.random.Generator) -> Item:
    size = float(rng.uniform(16, 26))
    return Item("shape", _jitter(cell[0], size, rng), _jitter(cell[1], size, rng), size, size, color, shape)


def _digit(cell: tuple[int, int], held_out: bool, rng: np.random.Generator) -> Item:
    value, size = int(rng.integers(10)), float(rng.choice([16, 24]))
    x, y = (round(_jitter(c, size, rng)) for c in cell)
    return Item("digit", x, y, size, size, value=value, picture=_pick_picture(value, held_out, rng))


def _word(cell: tuple[int, int], text: str, height: int, rng: np.random.Generator) -> list[Item]:
    """A word over two cells; one letter a patch, with a common offset of up to two pixels."""
    slack = 2 * CELL // PATCH - len(text)
    first = cell[0] * CELL + PATCH * int(rng.integers(slack + 1)) + PATCH // 2 + int(rng.integers(-2, 3))
    y = cell[1] * CELL + PATCH * int(rng.integers(3)) + PATCH // 2 + int(rng.integers(-2, 3))
    y = min(max(y, 7), height - 7)
    return [
        Item("letter", first + PATCH * i, y, 10, 14, value=LETTERS.index(letter), index=i)
        for i, letter in enumerate(text)
    ]


def random_word(rng: np.random.Generator) -> str:
    """3 to 5 random letters: no prior helps to read them."""
    return "".join(rng.choice(list(LETTERS), int(rng.integers(3, MAX_LETTERS + 1))))


def _attributes(count: int, rng: np.random.Generator, confusable: bool) -> list[tuple[str, str]]:
    """Distinct (colour, shape) pairs; half of the scenes let several items share one colour or one shape.

    ``confusable`` ones always do, so that a colour alone or a shape alone finds the wrong item.
    """
    pairs = [(c, s) for c in COLORS for s in SHAPES]
    chosen: list[tuple[str, str]] = []
    if confusable or rng.random() < 0.5:
        shared = pairs[int(rng.integers(len(pairs)))][axis := int(rng.integers(2))]
        alike = [p for p in pairs if p[axis] == shared]
        take = int(rng.integers(2 if confusable else 1, min(count, 4) + 1))
        chosen = [alike[i] for i in rng.choice(len(alike), take, replace=False)]
        pairs = [p for p in pairs if p[axis] != shared]
    rest = rng.choice(len(pairs), count - len(chosen), replace=False)
    return chosen + [pairs[i] for i in rest]


def sample_scene(
    rng: np.random.Generator,
    held_out: bool = False,
    crowded: bool = False,
    most_shapes: int = 6,
    confusable: bool = False,
    cells: tuple[int, int] = (CELLS, CELLS),
    word_step: int = 1,
) -> Scene:
    """Draw a scene: 2 to ``most_shapes`` shapes, and with probability 0.6 each a digit and a word.

    ``crowded`` fills every cell (used to train the vision tower: more labels per picture);
    ``held_out`` takes handwritten digits that no training scene shows; ``most_shapes`` and ``confusable`` (several
    items share a colour or a shape) are for the curriculum of the training. ``cells`` is the size of the picture,
    (columns, rows) of CELL pixels; words start at every ``word_step``-th column.
    """
    free = {(c, r) for c in range(cells[0]) for r in range(cells[1])}
    items: list[Item] = []
    for _ in range(2 if crowded else int(rng.random() < 0.6)):
        starts = [(c, r) for c, r in sorted(free) if c % word_step == 0 and (c + 1, r) in free]
        c, r = starts[int(rng.integers(len(starts)))]
        free -= {(c, r), (c + 1, r)}
        letters = _word((c, r), random_word(rng), cells[1] * CELL, rng)
        items += letters
    left = sorted(free)
    rng.shuffle(left)
    for _ in range(min(4, len(left) // 3) if crowded else int(rng.random() < 0.6)):
        items.append(_digit(left.pop(), held_out, rng))
    number = len(left) if crowded else int(rng.integers(2, min(most_shapes, len(left)) + 1))
    for color, shape in _attributes(number, rng, confusable):
        items.append(_shape(left.pop(), color, shape, rng))
    return Scene(tuple(items), cells[0] * CELL, cells[1] * CELL)


def _coverage(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Anti-aliased coverage in [0, 1] of a shape of the given radius, ``dx``, ``dy`` pixels from its centre."""
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "ring":
        distance = np.abs(np.hypot(dx, dy) - radius * 0.75) - radius * 0.25
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - radius * 0.85
    elif shape == "diamond":
        distance = (np.abs(dx) + np.abs(dy) - radius) / np.sqrt(2)
    elif shape == "cross":
        arm = radius * 0.32
        distance = np.minimum(
            np.maximum(np.abs(dx) - arm, np.abs(dy) - radius), np.maximum(np.abs(dy) - arm, np.abs(dx) - radius)
        )
    else:  # triangle, tip up
        distance = np.maximum(dy - radius * 0.8, (np.abs(dx) * 2 - dy - radius) / np.sqrt(5))
    return np.clip(0.5 - distance, 0, 1)


def _blend(canvas: np.ndarray, x0: int, y0: int, alpha: np.ndarray, color: np.ndarray) -> None:
    height, width = alpha.shape
    top, left = max(y0, 0), max(x0, 0)
    bottom, right = min(y0 + height, canvas.shape[0]), min(x0 + width, canvas.shape[1])
    a = alpha[top - y0 : bottom - y0, left - x0 : right - x0, None]
    region = canvas[top:bottom, left:right]
    region += a * (color - region)


def _background(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    tone, slopes = rng.uniform(95, 160), rng.uniform(-25, 25, 2)
    if scene.paper:
        tone, slopes = 150 + tone / 2, slopes / 4
    ramps = (np.linspace(-1, 1, side, dtype=np.float32) for side in (scene.width, scene.height))
    across, down = (slope * ramp for slope, ramp in zip(slopes, ramps, strict=True))
    return np.repeat((tone + across[None] + down[:, None])[..., None], 3, axis=2), tone


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Paint a scene on a noisy grey gradient; returns uint8 (height, width, 3)."""
    canvas, tone = _background(scene, rng)
    ink = np.full(3, 15.0 if tone > 128 else 240.0)  # of digits and words: whatever stands out
    for item in scene.items:
        x0, y0 = int(item.x - item.width / 2) - 2, int(item.y - item.height / 2) - 2
        if item.kind == "shape":
            span = np.arange(int(item.width) + 5)
            dx, dy = x0 + span[None] + 0.5 - item.x, y0 + span[:, None] + 0.5 - item.y
            tint = np.clip(np.array(COLORS[item.color]) + rng.uniform(-18, 18, 3), 0, 255)
            _blend(canvas, x0, y0, _coverage(item.shape, dx, dy, item.width / 2), tint)
        elif item.kind == "digit":
            scale = int(item.width) // 8
            alpha = np.kron(digit_pictures()[0][item.picture], np.ones((scale, scale)))
            _blend(canvas, x0 + 2, y0 + 2, alpha, ink)
        elif item.kind == "stroke":
            _blend(canvas, x0 + 2, y0 + 2, 0.5 * rng.random((int(item.height), int(item.width))).round(), ink)
        else:
            alpha = np.kron(GLYPHS[CHARACTERS[item.value]], np.ones((2, 2)))
            _blend(canvas, x0 + 2, y0 + 2, alpha, ink)
    canvas += rng.integers(-9, 10, canvas.shape, dtype=np.int8)
    return np.clip(canvas, 0, 255).astype(np.uint8)
