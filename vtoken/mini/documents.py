# SPDX-License-Identifier: Apache-2.0
"""Questions about pages, pairs of pictures and videos, and the held-out documents of every kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from vtoken.mini.pages import sample_page
from vtoken.mini.questions import KINDS, Question
from vtoken.mini.videos import FRAMES, VIDEO_KINDS, sample_video
from vtoken.mini.world import COLORS, SHAPES, Item, Scene, Split, render, sample_scene

VERSION = 1  # of the documents: any change of pixels, scenes or questions must raise it

SQUARE = (4, 4)
WIDE_AND_TALL = ((6, 2), (2, 6), (4, 2), (2, 4))
PAIRS = ((4, 2), (2, 4))
PAIR_SHAPES = 3  # things in each of two pictures, at most


def describe(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Name everything, in the order of the colours and then of the shapes."""
    order = sorted(scene.of("shape"), key=lambda i: (list(COLORS).index(i.color), SHAPES.index(i.shape)))
    answer = " , ".join(f"{item.color} {item.shape}" for item in order)
    return Question("describe", "describe the picture .", answer, tuple(item.box for item in order))


def read_word(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Read the word of a page."""
    boxes = tuple(item.box for item in scene.of("letter"))
    return Question("read", "what does the text say ?", scene.word, boxes)


def read_number(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Read the number of a page."""
    boxes = tuple(item.box for item in scene.of("figure"))
    return Question("read", "what is the number ?", scene.number, boxes)


def which_picture(scenes: list[Scene], rng: np.random.Generator) -> Question | None:
    """Which of two pictures shows the red circle? Only things of exactly one of them are asked for."""
    found = [(n, item) for n, scene in enumerate(scenes) for item in scene.of("shape")]
    pairs = [(item.color, item.shape) for _, item in found]
    once = [(n, item) for n, item in found if pairs.count((item.color, item.shape)) == 1]
    if not once:
        return None
    number, item = once[int(rng.integers(len(once)))]
    text = f"which picture shows the {item.color} {item.shape} ?"
    return Question("multi", text, ("first", "second")[number], (item.box,), (number,))


def how_many_pictures(scenes: list[Scene], rng: np.random.Generator) -> Question | None:
    """How many of two pictures show a circle?"""
    shown: dict[str, list[tuple[int, Item]]] = {shape: [] for shape in SHAPES}
    for number, scene in enumerate(scenes):
        for item in scene.of("shape"):
            shown[item.shape].append((number, item))
    by_count: dict[int, list[str]] = {}
    for shape, found in shown.items():
        by_count.setdefault(len({n for n, _ in found}), []).append(shape)
    counts = sorted(by_count)
    count = counts[int(rng.integers(len(counts)))]
    shape = by_count[count][int(rng.integers(len(by_count[count])))]
    boxes, pictures = tuple(item.box for _, item in shown[shape]), tuple(n for n, _ in shown[shape])
    return Question("multi", f"how many pictures show a {shape} ?", str(count), boxes, pictures)


Ask = Callable[[Scene, np.random.Generator], Question | None]
SCENE_KINDS: dict[str, Ask] = {**KINDS, "describe": describe}
PAGE_KINDS: dict[str, Ask] = {"word": read_word, "number": read_number}
PAIR_KINDS = {"which": which_picture, "how many": how_many_pictures}
TASKS: dict[str, tuple[str, ...]] = {
    "exist": ("existence",),
    "attr": ("color", "shape", "position"),
    "relation": ("relation",),
    "count": ("count",),
    "read": ("word", "number"),
    "multi": ("which", "how many"),
    "describe": ("describe",),
    "video": tuple(VIDEO_KINDS),
}
"""Task -> the kinds of questions that it asks in turn."""


@dataclass(frozen=True)
class Document:
    """A held-out question with its pictures, uint8 (height, width, 3) each; those of a video are its frames.

    ``evidence`` holds, for each picture, the boxes (x0, y0, x1, y1) in pixels that the answer depends on.
    """

    kind: str
    question: str
    answer: str
    images: tuple[np.ndarray, ...]
    evidence: tuple[tuple[tuple[float, float, float, float], ...], ...]
    video: bool = False


def _boxes(question: Question, count: int) -> tuple[tuple[tuple[float, float, float, float], ...], ...]:
    pictures = question.pictures or (0,) * len(question.evidence)
    pairs = list(zip(question.evidence, pictures, strict=True))
    return tuple(tuple(box for box, n in pairs if n == picture) for picture in range(count))


def sample_size(task: str, rng: np.random.Generator) -> tuple[int, int]:
    """Columns and rows of cells of a document's pictures."""
    if task == "multi":
        return PAIRS[int(rng.integers(len(PAIRS)))]
    return SQUARE if rng.random() < 0.6 else WIDE_AND_TALL[int(rng.integers(len(WIDE_AND_TALL)))]


def sample_pictures(task: str, cells: tuple[int, int], rng: np.random.Generator, held_out: bool = False) -> list[Scene]:
    """Draw what a document of a task shows: one picture, two, or the frames of a video (of a size of its own)."""
    if task == "video":
        return sample_video(rng)
    if task == "multi":
        return [sample_scene(rng, held_out, most_shapes=PAIR_SHAPES, cells=cells, word_step=2) for _ in range(2)]
    if task == "read":
        return [sample_page(rng, cells)]
    return [sample_scene(rng, held_out, cells=cells, word_step=2)]


def ask(task: str, kind: str, scenes: list[Scene], rng: np.random.Generator) -> Question | None:
    """Ask one kind of question of a task; None where the pictures do not allow it."""
    if task == "video":
        return VIDEO_KINDS[kind](scenes, rng)
    if task == "multi":
        return PAIR_KINDS[kind](scenes, rng)
    kinds = PAGE_KINDS if task == "read" else SCENE_KINDS
    return kinds[kind](scenes[0], rng)


def _documents(task: str) -> Iterator[Document]:
    number, asked = 0, 0
    while True:
        rng = np.random.default_rng([Split.TEST, 1 + list(TASKS).index(task), number])
        number += 1
        scenes = sample_pictures(task, sample_size(task, rng), rng, held_out=True)
        question = ask(task, TASKS[task][asked % len(TASKS[task])], scenes, rng)
        if question is None:
            continue
        asked += 1
        images = tuple(render(scene, rng) for scene in scenes)
        yield Document(
            task, question.text, question.answer, images, _boxes(question, len(scenes)), video=task == "video"
        )


def held_out(kind: str, count: int = 500) -> list[Document]:
    """The first ``count`` held-out documents of a task; the same on every machine for one `VERSION`.

    Parameters
    ----------
    kind : str
        One of `TASKS`.
    count : int
        How many; a longer list begins with a shorter one.

    Raises
    ------
    ValueError
        If there is no such task.
    """
    if kind not in TASKS:
        raise ValueError(f"Unknown task {kind!r}: known are {', '.join(TASKS)}.")
    documents = _documents(kind)
    return [next(documents) for _ in range(count)]


WORDS = [
    *("picture", "pictures", "which", "shows", "show", "first", "second", "number", "describe", ".", ","),
    *("way", "does", "move", "moves", "moving", "up", "down", "appear", "appears", "before", "after", "video"),
    *(f"##{n}" for n in range(10)),
]
"""Words that the questions of `vtoken.mini.questions` do not need."""

__all__ = ["FRAMES", "TASKS", "VERSION", "Document", "ask", "held_out", "sample_pictures"]
