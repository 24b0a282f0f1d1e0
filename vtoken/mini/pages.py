# SPDX-License-Identifier: Apache-2.0
"""Document-like pages: lines of unreadable strokes with one word and one number between them."""

from __future__ import annotations

import numpy as np

from vtoken.mini.world import CELL, CELLS, CHARACTERS, LETTERS, MAX_LETTERS, PATCH, Item, Scene, random_word

LINE = PATCH  # height of a line of text on a page
BLOCK = 2 * CELL // PATCH  # characters a block of text is wide


def _print(text: str, kind: str, block: int, line: int, height: int, rng: np.random.Generator) -> list[Item]:
    first = PATCH * (block * BLOCK + int(rng.integers(BLOCK - len(text) + 1))) + PATCH // 2 + int(rng.integers(-2, 3))
    y = min(max(line * LINE + LINE // 2 + int(rng.integers(-2, 3)), 7), height - 7)
    return [
        Item(kind, first + PATCH * i, y, 10, 14, value=CHARACTERS.index(character), index=i)
        for i, character in enumerate(text)
    ]


def _random_text(kind: str, rng: np.random.Generator) -> str:
    if kind == "letter":
        return random_word(rng)
    return "".join(rng.choice(list(CHARACTERS[len(LETTERS) :]), int(rng.integers(3, MAX_LETTERS + 1))))


def sample_page(rng: np.random.Generator, cells: tuple[int, int] = (CELLS, CELLS), crowded: bool = False) -> Scene:
    """Draw a document-like page: lines of unreadable strokes, and somewhere between them one word and one number.

    ``crowded`` makes most strokes words or numbers (used to train the vision tower: more labels per picture).
    """
    width, height = (n * CELL for n in cells)
    places = [(block, line) for block in range(width // (BLOCK * PATCH)) for line in range(height // LINE)]
    chosen = [places[int(i)] for i in rng.choice(len(places), 2, replace=False)]
    number = _random_text("figure", rng)
    items = _print(random_word(rng), "letter", *chosen[0], height, rng)
    items += _print(number, "figure", *chosen[1], height, rng)
    for block, line in places:
        if (block, line) in chosen or rng.random() < 0.35:
            continue
        if crowded and rng.random() < 0.8:
            kind = "letter" if rng.random() < 0.6 else "figure"
            items += _print(_random_text(kind, rng), kind, block, line, height, rng)
            continue
        wide = int(rng.integers(20, BLOCK * PATCH - 6))
        x = block * BLOCK * PATCH + 3 + wide / 2
        items.append(Item("stroke", x, line * LINE + LINE / 2, wide, int(rng.integers(4, 9))))
    return Scene(tuple(items), width, height, paper=True)
