# SPDX-License-Identifier: Apache-2.0
"""Questions about a scene, one function a kind; each returns None where the scene does not allow the question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vtoken.mini.world import COLORS, LETTERS, SHAPES, Item, Scene

MAX_COUNT = 4


@dataclass(frozen=True)
class Question:
    """A question, its answer, and the boxes (x0, y0, x1, y1) of the items that the answer depends on.

    ``pictures`` says which picture or frame each box is of (all of the first one if empty), ``named`` which boxes each
    noun of the question stands for (one each if empty).
    """

    kind: str
    text: str
    answer: str
    evidence: tuple[tuple[float, float, float, float], ...] = ()
    pictures: tuple[int, ...] = ()
    named: tuple[tuple[int, ...], ...] = ()


def _choose(options: list, rng: np.random.Generator):
    return options[int(rng.integers(len(options)))]


def _name(item: Item) -> str:
    return f"{item.color} {item.shape}"


def _unique(shapes: list[Item], attribute: str) -> list[Item]:
    count = Counter(getattr(item, attribute) for item in shapes)
    return [item for item in shapes if count[getattr(item, attribute)] == 1]


def existence(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Is there a red circle? Half of the wrong pairs are made of attributes that are both in the picture."""
    shapes = scene.of("shape")
    if rng.random() < 0.5:
        item = _choose(shapes, rng)
        return Question("existence", f"is there a {_name(item)} ?", "yes", (item.box,))
    present = {(item.color, item.shape) for item in shapes}
    absent = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in present]
    colors, forms = {c for c, _ in present}, {s for _, s in present}
    mixed = [(c, s) for c, s in absent if c in colors and s in forms]
    color, shape = _choose(mixed if mixed and rng.random() < 0.5 else absent, rng)
    near = tuple(item.box for item in shapes if item.color == color or item.shape == shape)
    return Question("existence", f"is there a {color} {shape} ?", "no", near)


def color(scene: Scene, rng: np.random.Generator) -> Question | None:
    """What color is the circle? Only shapes that occur once are asked for."""
    if not (once := _unique(scene.of("shape"), "shape")):
        return None
    item = _choose(once, rng)
    return Question("color", f"what color is the {item.shape} ?", item.color, (item.box,))


def shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    """What shape is the red thing? Only colours that occur once are asked for."""
    if not (once := _unique(scene.of("shape"), "color")):
        return None
    item = _choose(once, rng)
    return Question("shape", f"what shape is the {item.color} thing ?", item.shape, (item.box,))


def position(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Where is the red circle? Answered by the quadrant."""
    item = _choose(scene.of("shape"), rng)
    where = f"{'top' if item.y < scene.height / 2 else 'bottom'} {'left' if item.x < scene.width / 2 else 'right'}"
    return Question("position", f"where is the {_name(item)} ?", where, (item.box,))


def relation(scene: Scene, rng: np.random.Generator, axis: int | None = None, one_way: bool = False) -> Question | None:
    """Is A left (right) of B, above (below) B? Only pairs whose cells differ along the axis that is asked for.

    ``axis`` (0: left and right) and ``one_way`` (left and above only) are for the curriculum of the training.
    """
    if axis is None:
        axis = int(rng.integers(2))
    shapes = scene.of("shape")
    pairs = [(a, b) for a in shapes for b in shapes if a.cell[axis] < b.cell[axis]]
    if not pairs:
        return None
    before, after = _choose(pairs, rng)
    word, opposite = (("left of", "right of"), ("above", "below"))[axis]
    first, second = (before, after) if rng.random() < 0.5 else (after, before)
    asked = word if one_way else _choose([word, opposite], rng)
    answer = "yes" if (first is before) == (asked == word) else "no"
    text = f"is the {_name(first)} {asked} the {_name(second)} ?"
    return Question("relation", text, answer, (first.box, second.box))


def count(scene: Scene, rng: np.random.Generator) -> Question | None:
    """How many circles (red things) are there? 0 to 4, with the answers drawn evenly where the scene allows it."""
    shapes = scene.of("shape")
    number = {f"{s}s": [i for i in shapes if i.shape == s] for s in SHAPES}
    number |= {f"{c} things": [i for i in shapes if i.color == c] for c in COLORS}
    by_count: dict[int, list[str]] = {}
    for name, found in number.items():
        if len(found) <= MAX_COUNT:
            by_count.setdefault(len(found), []).append(name)
    name = _choose(by_count[_choose(sorted(by_count), rng)], rng)
    found = number[name]
    return Question("count", f"how many {name} are there ?", str(len(found)), tuple(i.box for i in found))


def digit(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Which handwritten digit is shown?"""
    if len(digits := scene.of("digit")) != 1:
        return None
    return Question("digit", "what is the digit ?", str(digits[0].value), (digits[0].box,))


def word(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Read the rendered word."""
    letters = scene.of("letter")
    if sum(item.index == 0 for item in letters) != 1:
        return None
    return Question("word", "what does the text say ?", scene.word, tuple(item.box for item in letters))


KINDS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    f.__name__: f for f in (existence, color, shape, position, relation, count, digit, word)
}

WORDS = sorted(
    {*COLORS, *SHAPES, *(f"{s}s" for s in SHAPES), "thing", "things", "?", "yes", "no"}
    | {"is", "there", "a", "what", "color", "the", "shape", "where", "left", "right", "of", "above", "below"}
    | {"top", "bottom", "how", "many", "are", "digit"}
    | {"does", "text", "say", *"0123456789"}
)
"""Every word of the questions and answers but the letters, which are a vocabulary of their own."""

LETTER_TOKENS = [*(letter for letter in LETTERS if letter not in WORDS), *(f"##{letter}" for letter in LETTERS)]
