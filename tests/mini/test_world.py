# SPDX-License-Identifier: Apache-2.0
"""The picture world: deterministic, held out, and asked correctly."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from vtoken.mini.models import llava
from vtoken.mini.questions import KINDS, WORDS, relation
from vtoken.mini.training.labels import IGNORE, token_labels
from vtoken.mini.world import (
    COLORS,
    GRID,
    HELD_OUT_DIGITS,
    IMAGE,
    PATCH,
    Split,
    digit_pictures,
    render,
    sample_scene,
)


def scene_and_rng(number, **options):
    rng = np.random.default_rng([Split.DEV, number])
    return sample_scene(rng, **options), rng


def test_pixels_never_change():
    """A change of the generator must raise VERSION and this digest."""
    digest = hashlib.sha256()
    for number in range(20):
        scene, rng = scene_and_rng(number, held_out=True)
        digest.update(render(scene, rng).tobytes())
    assert digest.hexdigest() == "0518dccce24ff362e3b6a41d6a30706e704bcf7b5736436ad8df94b49ec53807"


def test_held_out_digits_never_train():
    first = len(digit_pictures()[0]) - HELD_OUT_DIGITS
    for number in range(200):
        assert all(i.picture < first for i in scene_and_rng(number)[0].of("digit"))
        assert all(i.picture >= first for i in scene_and_rng(number, held_out=True)[0].of("digit"))


def test_items_stay_inside_and_apart():
    for number in range(200):
        scene, _ = scene_and_rng(number)
        shapes = scene.of("shape")
        assert len({item.cell for item in shapes}) == len(shapes)
        assert len({(item.color, item.shape) for item in shapes}) == len(shapes)
        for item in scene.items:
            assert min(item.box) >= 0
            assert max(item.box) <= IMAGE


def test_a_shape_has_its_color_where_its_label_says():
    for number in range(40):
        scene, rng = scene_and_rng(number)
        pixels = render(scene, rng).astype(float)
        labels = token_labels([scene], llava.places(IMAGE, IMAGE))
        for item in scene.of("shape"):
            if item.shape == "ring":  # hollow at its centre
                continue
            y, x = int(item.y), int(item.x)
            patch = y // PATCH * GRID + x // PATCH
            assert labels["color"][patch] == list(COLORS).index(item.color)
            assert labels["center"][patch] == 1
            distance = {name: np.abs(pixels[y, x] - rgb).sum() for name, rgb in COLORS.items()}
            assert min(distance, key=distance.get) == item.color


def test_labels_of_background_are_ignored():
    labels = token_labels([scene_and_rng(0)[0]], llava.places(IMAGE, IMAGE))
    background = labels["kind"] == 0
    assert background.any()
    assert (labels["color"][background] == IGNORE).all()


def answers(kind, numbers=range(400)):
    found = []
    for number in numbers:
        scene, rng = scene_and_rng(number)
        if (question := KINDS[kind](scene, rng)) is not None:
            found.append((scene, question))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_questions_use_known_words_and_point_at_evidence(kind):
    for _, question in answers(kind):
        assert set(question.text.split()) <= set(WORDS)
        assert question.kind == kind
        assert all(x0 < x1 and y0 < y1 for x0, y0, x1, y1 in question.evidence)


@pytest.mark.parametrize(("kind", "most"), [("existence", 0.6), ("relation", 0.6), ("count", 0.45), ("position", 0.35)])
def test_no_answer_is_a_good_guess(kind, most):
    """A model that sees no picture must not score: the most frequent answer stays rare."""
    given = [question.answer for _, question in answers(kind)]
    assert max(given.count(answer) for answer in set(given)) / len(given) < most


def test_answers_are_true():
    for scene, question in answers("existence"):
        color, shape = question.text.split()[3:5]
        there = any(item.color == color and item.shape == shape for item in scene.of("shape"))
        assert question.answer == ("yes" if there else "no")
    for scene, question in answers("count"):
        word = question.text.split()[2]
        number = sum(word in (item.color, f"{item.shape}s") for item in scene.of("shape"))
        assert question.answer == str(number)
    for scene, question in answers("word"):
        assert question.answer == scene.word
        assert 3 <= len(question.answer) <= 5


def test_relations_are_true():
    for scene, question in answers("relation"):
        words = question.text.split()
        second = len(words) - 1 - words[::-1].index("the")
        items = {(i.color, i.shape): i for i in scene.of("shape")}
        a, b = items[tuple(words[2:4])], items[tuple(words[second + 1 : second + 3])]
        true = {"left": a.x < b.x, "right": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}[words[4]]
        assert question.answer == ("yes" if true else "no")


def test_relation_of_one_axis():
    for number in range(50):
        scene, rng = scene_and_rng(number)
        question = relation(scene, rng, axis=0, one_way=True)
        assert question is None or " left of " in question.text
