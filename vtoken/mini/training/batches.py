# SPDX-License-Identifier: Apache-2.0
"""Training batches: documents of one size, their labels, and question/answer pairs packed behind each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from vtoken.mini.model import ASSISTANT, EOS
from vtoken.mini.models.base import VOCAB, Places
from vtoken.mini.questions import KINDS, Question, relation
from vtoken.mini.training.labels import FIELDS, box_tokens, center_token, legible_token, token_labels
from vtoken.mini.world import SHAPES, Scene, Split, render

Ask = Callable[[list[Scene], np.random.Generator], Question | None]
GROUNDED = ("existence", "color", "shape", "position", "relation", "multi", "video")
COMPARED = (" left of ", " right of ", " above ", " below ", " before ")
NOUNS = (*SHAPES, "thing")


def _of_scene(kind: Callable[[Scene, np.random.Generator], Question | None]) -> Ask:
    return lambda scenes, rng: kind(scenes[0], rng)


SCENE_ASKS: dict[str, Ask] = {
    **{name: _of_scene(kind) for name, kind in KINDS.items()},
    "beside": _of_scene(functools.partial(relation, axis=0)),
    "left of": _of_scene(functools.partial(relation, axis=0, one_way=True)),
}
"""The kinds, and simpler relations: a comparison that opposite words negate is a parity, found very late without."""


@dataclass
class Batch:
    """B documents of one size: their pictures' scenes, where their visual tokens look, labels field -> (B, N).

    A scene is shown at 1 / ``shrunk`` of its size; the places are in the pixels of the scene.
    """

    scenes: list[list[Scene]]
    places: Places
    labels: dict[str, torch.Tensor]
    shrunk: float = 1.0

    def paint(self, rng: np.random.Generator) -> list[list[np.ndarray]]:
        """The pixels of every picture, uint8 (height, width, 3) each."""
        return [[self._fitted(render(scene, rng)) for scene in document] for document in self.scenes]

    def _fitted(self, pixels: np.ndarray) -> np.ndarray:
        if self.shrunk == 1.0:
            return pixels
        height, width = (round(side / self.shrunk) for side in pixels.shape[:2])
        return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def label_batch(documents: list[list[Scene]], places: Places, shown: Callable[[list[Scene]], list[Scene]]) -> Batch:
    """Label documents; ``shown`` picks the scenes that the places number (of a video, not every frame)."""
    labels = [token_labels(shown(scenes), places) for scenes in documents]
    stacked = {name: torch.from_numpy(np.stack([label[name] for label in labels])) for name in FIELDS}
    return Batch(documents, places, stacked)


def train_rng(seed: int) -> np.random.Generator:
    """The random stream of one training phase."""
    return np.random.default_rng([Split.TRAIN, seed])


def answer_tokens(question: Question) -> list[int]:
    """Ids of the answer and </s>; what is read in a picture is spelled."""
    pieces = question.answer.split()
    if question.kind in ("word", "read"):
        pieces = [question.answer[0], *(f"##{character}" for character in question.answer[1:])]
    return [VOCAB[piece] for piece in [*pieces, EOS]]


def ask(scenes: list[Scene], number: int, asks: Sequence[Ask], rng: np.random.Generator) -> list[Question]:
    """Ask up to ``number`` questions, in random order of kinds."""
    found: list[Question] = []
    while len(found) < number:
        order = [asks[i] for i in rng.permutation(len(asks))]
        asked = [q for kind in order if (q := kind(scenes, rng)) is not None]
        found += asked
        if not asked:
            break
    return found[:number]


@dataclass
class Noun:
    """Something that a question (or a described answer) names: the token that does, and where it is shown."""

    token: int
    region: np.ndarray
    center: int


def _place(question: Question, boxes: Sequence[int], places: Places, step: int) -> tuple[np.ndarray, int]:
    pictures = question.pictures or (0,) * len(question.evidence)
    regions = [box_tokens(question.evidence[i], pictures[i] // step, places) for i in boxes]
    last = boxes[-1]
    return np.logical_or.reduce(regions), center_token(question.evidence[last], pictures[last] // step, places)


def named(question: Question, places: Places, step: int = 1) -> list[Noun]:
    """What a question names and the pictures show; ``step`` frames of a video make one picture of ``places``."""
    words = question.text.split()
    if question.kind == "describe":
        columns = [len(words) + 2 + 3 * i for i in range(len(question.evidence))]  # shape words of the answer
        boxes: Sequence[Sequence[int]] = [(i,) for i in range(len(columns))]
    else:
        absent = question.kind == "existence" and question.answer == "no"
        columns = [i for i, word in enumerate(words) if word in NOUNS]
        boxes = question.named or [(i,) for i in range(len(question.evidence))]
        if question.kind not in GROUNDED or absent or len(columns) != len(boxes):
            return []
    return [Noun(at, *_place(question, b, places, step)) for at, b in zip(columns, boxes, strict=True)]


def written(question: Question, places: Places) -> list[tuple[int, np.ndarray]]:
    """(token that comes before a part of the answer, (N,) bool visual tokens that show that part)."""
    first = len(question.text.split())
    if question.kind == "describe":
        return [(first + 3 * i, box_tokens(box, 0, places)) for i, box in enumerate(question.evidence)]
    if question.kind in ("word", "read"):
        return [(first + i, legible_token(box, places)) for i, box in enumerate(question.evidence)]
    return []


@dataclass
class Pack:
    """Question/answer pairs behind each of B documents, each of which sees the document and itself only.

    ids, labels, positions (from 0 in each pair), block (B, T): block is the pair's number from 1 on, 0 for padding;
    labels are -100 outside of the answers; kinds names the pairs. nouns (B, R) are text columns that name an item (-1:
    padding), regions (B, R, N) the visual tokens that show it and centers (B, R) the one at its centre. pairs (B, Q, 3)
    are, for comparisons of two items, the columns of both nouns and of the token that answers (-1: padding). writing
    (B, W) are columns whose next token is read off the visual tokens sources (B, W, N).
    """

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    block: torch.Tensor
    nouns: torch.Tensor
    regions: torch.Tensor
    centers: torch.Tensor
    pairs: torch.Tensor
    writing: torch.Tensor
    sources: torch.Tensor
    kinds: list[list[str]]


def pack(asked: list[list[Question]], places: Places, step: int = 1) -> Pack:
    """Tokenize and pack questions for each document."""
    texts = [[[VOCAB[w] for w in q.text.split()] + [VOCAB[ASSISTANT]] for q in row] for row in asked]
    answers = [[answer_tokens(q) for q in row] for row in asked]
    size, most = len(asked), max(map(len, asked))
    length = max(sum(len(t) + len(a) for t, a in zip(*row, strict=True)) for row in zip(texts, answers, strict=True))
    nouns = [[named(q, places, step) for q in row] for row in asked]
    room = max(1, max(sum(map(len, row)) for row in nouns))
    parts = [[written(q, places) for q in row] for row in asked]
    most_parts = max(1, max(sum(map(len, row)) for row in parts))
    text = {name: np.full((size, length), start) for name, start in _TEXT.items()}
    out: dict[str, Any] = {"nouns": np.full((size, room), -1), "centers": np.zeros((size, room), int)}
    out["regions"], out["pairs"] = np.zeros((size, room, len(places.boxes)), bool), np.full((size, most, 3), -1)
    out["writing"], out["sources"] = (
        np.full((size, most_parts), -1),
        np.zeros((size, most_parts, len(places.boxes)), bool),
    )
    for b, row in enumerate(asked):
        start = used = wrote = 0
        for i, question in enumerate(row):
            prompt, reply = texts[b][i], answers[b][i]
            middle, end = start + len(prompt), start + len(prompt) + len(reply)
            text["ids"][b, start:end], text["labels"][b, middle:end] = prompt + reply, reply
            text["positions"][b, start:end], text["block"][b, start:end] = np.arange(end - start), i + 1
            found = nouns[b][i]
            if len(found) == 2 and any(word in question.text for word in COMPARED):
                out["pairs"][b, i] = [*(start + noun.token for noun in found), middle - 1]
            for r, noun in enumerate(found, used):
                out["nouns"][b, r], out["regions"][b, r] = start + noun.token, noun.region
                out["centers"][b, r] = noun.center
            for w, (token, source) in enumerate(parts[b][i], wrote):
                out["writing"][b, w], out["sources"][b, w] = start + token, source
            start, used, wrote = end, used + len(found), wrote + len(parts[b][i])
    tensors = {name: torch.from_numpy(value) for name, value in {**text, **out}.items()}
    return Pack(**tensors, kinds=[[q.kind for q in row] for row in asked])


_TEXT = {"ids": 0, "labels": -100, "positions": 0, "block": 0}


def attention_mask(prefix: int, block: torch.Tensor) -> torch.Tensor:
    """(B, 1, S, S) bool: causal; a pair sees the ``prefix`` columns and itself."""
    owner = torch.cat([block.new_zeros(block.shape[0], prefix), torch.where(block == 0, -1, block)], 1)
    causal = torch.ones(owner.shape[1], owner.shape[1], dtype=torch.bool).tril()
    seen = (owner[:, None] == 0) | (owner[:, None] == owner[:, :, None])
    return (seen & causal)[:, None]
