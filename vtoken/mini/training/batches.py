# SPDX-License-Identifier: Apache-2.0
"""Training batches: scenes, their labels, and several question/answer pairs packed behind each picture."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vtoken.mini.model import ASSISTANT, BOS, EOS, IMAGE_TOKEN, PAD, USER, VOCAB
from vtoken.mini.questions import KINDS, Question, relation
from vtoken.mini.training.labels import FIELDS, box_patches, center_patch, patch_labels, picture_labels
from vtoken.mini.world import GRID, SHAPES, Scene, Split, render, sample_scene

PATCHES = GRID * GRID
PREFIX = 2  # <s> <user>
MEAN, STD = 0.5, 0.25
GROUNDED = ("existence", "color", "shape", "position", "relation")
NOUNS = (*SHAPES, "thing")
TRAIN_KINDS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    **KINDS,
    "beside": functools.partial(relation, axis=0),
    "left of": functools.partial(relation, axis=0, one_way=True),
}
"""The kinds, and simpler relations: a comparison that opposite words negate is a parity, found very late without."""


@dataclass
class SceneBatch:
    """B scenes: pixels (B, 3, H, W) or empty, labels field -> (B, PATCHES), picture labels (B, C)."""

    scenes: list[Scene]
    pixels: torch.Tensor
    labels: dict[str, torch.Tensor]
    picture: torch.Tensor


def scene_batch(size: int, rng: np.random.Generator, pixels: bool = True, **options: Any) -> SceneBatch:
    """Draw training scenes; ``pixels=False`` skips the painting, ``options`` go to `sample_scene`."""
    scenes = [sample_scene(rng, **options) for _ in range(size)]
    labels = [patch_labels(scene) for scene in scenes]
    painted = torch.empty(0)
    if pixels:
        images = np.stack([render(scene, rng) for scene in scenes])
        painted = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD
    return SceneBatch(
        scenes,
        painted,
        {name: torch.from_numpy(np.stack([label[name] for label in labels])) for name in FIELDS},
        torch.from_numpy(np.stack([picture_labels(scene) for scene in scenes])),
    )


def train_rng(seed: int) -> np.random.Generator:
    """The random stream of one training phase."""
    return np.random.default_rng([Split.TRAIN, seed])


def answer_tokens(question: Question) -> list[int]:
    """Ids of the answer and </s>; words of the picture are spelled."""
    if question.kind == "word":
        pieces = [question.answer[0], *(f"##{letter}" for letter in question.answer[1:])]
    else:
        pieces = question.answer.split()
    return [VOCAB[piece] for piece in [*pieces, EOS]]


def ask(scene: Scene, number: int, kinds: Sequence[str], rng: np.random.Generator) -> list[Question]:
    """Ask up to ``number`` questions of the given kinds, in random order of kinds."""
    found: list[Question] = []
    while len(found) < number:
        order = [kinds[i] for i in rng.permutation(len(kinds))]
        asked = [q for kind in order if (q := TRAIN_KINDS[kind](scene, rng)) is not None]
        found += asked
        if not asked:
            break
    return found[:number]


@dataclass
class Pack:
    """Q question/answer pairs a scene, each of which sees the picture and itself only.

    ids, labels, positions, block (B, T): T = Q * length text columns; block is the pair's number from 1 on, 0 for
    padding; labels are -100 outside of the answers; kinds (B, Q) names each pair. nouns (B, R) are text columns that
    name an item (-1: padding), regions (B, R, PATCHES) the patches that show it and centers (B, R) the one at its
    centre. pairs (B, Q, 3) are, for questions about two items, the columns of both nouns and of the token that answers
    (-1: padding).
    """

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    block: torch.Tensor
    nouns: torch.Tensor
    regions: torch.Tensor
    centers: torch.Tensor
    pairs: torch.Tensor
    kinds: list[list[str]]
    length: int


def grounded_nouns(question: Question) -> list[tuple[int, np.ndarray, int]]:
    """(token of the question, patches, central patch) for every item that the question names and the picture shows."""
    if question.kind not in GROUNDED or (question.answer == "no" and question.kind == "existence"):
        return []
    nouns = [i for i, word in enumerate(question.text.split()) if word in NOUNS]
    return [(i, box_patches(box), center_patch(box)) for i, box in zip(nouns, question.evidence, strict=True)]


def pack(scenes: Sequence[Scene], number: int, kinds: Sequence[str], rng: np.random.Generator) -> Pack:
    """Tokenize and pack ``number`` questions for each scene."""
    asked = [ask(scene, number, kinds, rng) for scene in scenes]
    rows = [
        [([VOCAB[w] for w in q.text.split()] + [VOCAB[ASSISTANT]], answer_tokens(q)) for q in questions]
        for questions in asked
    ]
    length = max(len(q) + len(a) for row in rows for q, a in row)
    shape = len(scenes), number, length
    ids, labels = np.full(shape, VOCAB[PAD]), np.full(shape, -100)
    block = np.zeros(shape, int)
    for b, row in enumerate(rows):
        for i, (question, answer) in enumerate(row):
            end = len(question) + len(answer)
            ids[b, i, :end] = question + answer
            labels[b, i, len(question) : end] = answer
            block[b, i, :end] = i + 1
    nouns = np.full((len(scenes), 2 * number), -1)
    regions, centers = np.zeros((*nouns.shape, PATCHES), bool), np.zeros(nouns.shape, int)
    pairs = np.full((len(scenes), number, 3), -1)
    for b, questions in enumerate(asked):
        for i, q in enumerate(questions):
            if q.kind == "relation":
                pairs[b, i] = [i * length + at for at, *_ in grounded_nouns(q)] + [i * length + len(q.text.split())]
        found = [(i * length + at, *place) for i, q in enumerate(questions) for at, *place in grounded_nouns(q)]
        for r, (column, region, center) in enumerate(found):
            nouns[b, r], regions[b, r], centers[b, r] = column, region, center
    positions = np.broadcast_to(np.arange(length) + PREFIX + PATCHES, shape)

    def columns(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x.reshape(len(scenes), -1).copy())

    return Pack(
        ids=columns(ids),
        labels=columns(labels),
        positions=columns(positions),
        block=columns(block),
        nouns=torch.from_numpy(nouns),
        regions=torch.from_numpy(regions),
        centers=torch.from_numpy(centers),
        pairs=torch.from_numpy(pairs),
        kinds=[[q.kind for q in questions] for questions in asked],
        length=length,
    )


def attention_mask(visual: int, block: torch.Tensor) -> torch.Tensor:
    """(B, 1, S, S) bool: causal; a pair sees the prefix, the ``visual`` tokens and itself."""
    prefix = block.new_zeros(block.shape[0], PREFIX + visual)
    owner = torch.cat([prefix, torch.where(block == 0, -1, block)], 1)
    causal = torch.ones(owner.shape[1], owner.shape[1], dtype=torch.bool).tril()
    seen = (owner[:, None] == 0) | (owner[:, None] == owner[:, :, None])
    return (seen & causal)[:, None]


PREFIX_IDS = torch.tensor([VOCAB[BOS], VOCAB[USER]])
IMAGE_ID = VOCAB[IMAGE_TOKEN]
