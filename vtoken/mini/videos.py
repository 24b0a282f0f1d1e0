# SPDX-License-Identifier: Apache-2.0
"""Videos of shapes that appear one after the other, and move or stay; questions that need more than one frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from vtoken.mini.questions import Question
from vtoken.mini.world import CELL, COLORS, MOTIONS, SHAPES, Item, Scene

FRAMES = 8
STEP = 2  # frames that the towers of video models take as one
PACE = 2.5  # pixels a frame
CELLS = 2  # columns and rows of cells


def _still(cell: tuple[int, int], color: str, shape: str, rng: np.random.Generator) -> Item:
    size = float(rng.uniform(16, 22))
    x, y = (CELL * (c + 0.5) for c in cell)
    return Item("shape", x, y, size, size, color, shape, motion=list(MOTIONS)[int(rng.integers(len(MOTIONS)))])


def sample_video(rng: np.random.Generator) -> list[Scene]:
    """Draw FRAMES scenes of 2 or 3 things, each in a cell of its own, at most one a frame pair appearing anew."""
    cells = [(c, r) for c in range(CELLS) for r in range(CELLS)]
    pairs = [(c, s) for c in COLORS for s in SHAPES]
    number = int(rng.integers(2, 4))
    where, what = rng.choice(len(cells), number, replace=False), rng.choice(len(pairs), number, replace=False)
    things = [_still(cells[w], *pairs[int(p)], rng) for w, p in zip(where, what, strict=True)]
    starts = rng.choice(FRAMES // STEP, number, replace=False) * STEP
    starts[starts.argmin()] = 0
    return [
        Scene(
            tuple(_moved(t, frame) for t, start in zip(things, starts, strict=True) if frame >= start),
            CELLS * CELL,
            CELLS * CELL,
        )
        for frame in range(FRAMES)
    ]


def _moved(item: Item, frame: int) -> Item:
    dx, dy = MOTIONS[item.motion]
    way = PACE * (frame - (FRAMES - 1) / 2)
    return replace(item, x=item.x + dx * way, y=item.y + dy * way)


def _track(frames: list[Scene], item: Item) -> list[tuple[int, Item]]:
    """(frame, item) wherever a thing is shown."""
    alike = lambda other: (other.color, other.shape) == (item.color, item.shape)  # noqa: E731
    return [(n, other) for n, frame in enumerate(frames) for other in frame.of("shape") if alike(other)]


def direction(frames: list[Scene], rng: np.random.Generator) -> Question | None:
    """Which way does the red circle move?"""
    moving = [item for item in frames[-1].of("shape") if item.motion != "still"]
    if not moving:
        return None
    item = moving[int(rng.integers(len(moving)))]
    shown = _track(frames, item)
    boxes, pictures = tuple(i.box for _, i in shown), tuple(n for n, _ in shown)
    text = f"which way does the {item.color} {item.shape} move ?"
    return Question("video", text, item.motion, boxes, pictures, (tuple(range(len(shown))),))


def order(frames: list[Scene], rng: np.random.Generator) -> Question | None:
    """Does the red circle appear before the blue square?"""
    things = frames[-1].of("shape")
    first, second = (things[i] for i in rng.choice(len(things), 2, replace=False))
    tracks = [_track(frames, thing) for thing in (first, second)]
    shown = [*tracks[0], *tracks[1]]
    named = tuple(range(len(tracks[0]))), tuple(range(len(tracks[0]), len(shown)))
    answer = "yes" if tracks[0][0][0] < tracks[1][0][0] else "no"
    text = f"does the {first.color} {first.shape} appear before the {second.color} {second.shape} ?"
    return Question("video", text, answer, tuple(i.box for _, i in shown), tuple(n for n, _ in shown), named)


def number_moving(frames: list[Scene], rng: np.random.Generator) -> Question | None:
    """How many things move?"""
    moving = [item for item in frames[-1].of("shape") if item.motion != "still"]
    shown = [pair for item in moving for pair in _track(frames, item)]
    boxes, pictures = tuple(i.box for _, i in shown), tuple(n for n, _ in shown)
    return Question("video", "how many things move ?", str(len(moving)), boxes, pictures)


VIDEO_KINDS: dict[str, Callable[[list[Scene], np.random.Generator], Question | None]] = {
    f.__name__: f for f in (direction, order, number_moving)
}
