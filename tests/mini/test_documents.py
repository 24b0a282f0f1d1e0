# SPDX-License-Identifier: Apache-2.0
"""Pages, pairs and videos: deterministic, asked correctly, with evidence where the answer is."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np
import pytest

from vtoken.mini.documents import FRAMES, TASKS, VERSION, ask, held_out, sample_pictures, sample_size
from vtoken.mini.models.base import VOCAB
from vtoken.mini.world import CHARACTERS, GLYPHS, MOTIONS, Split

COUNT = 60


@pytest.fixture(scope="module")
def documents():
    return {kind: held_out(kind, COUNT) for kind in TASKS}


def test_documents_never_change():
    """A change of the generator must raise VERSION and this digest."""
    digest = hashlib.sha256()
    for kind in TASKS:
        for document in held_out(kind, 4):
            digest.update(json.dumps([document.question, document.answer, document.evidence]).encode())
            for image in document.images:
                digest.update(image.tobytes())
    assert (VERSION, digest.hexdigest()) == (1, "66c62dcf5d4e3a148e1663ffd3e2e86ef5fbfd2b1de4c5d1f6032b56a4cdb993")


def test_a_longer_list_begins_with_a_shorter_one():
    for short, long in zip(held_out("multi", 3), held_out("multi", 5), strict=False):
        assert short.question == long.question
        assert np.array_equal(short.images[0], long.images[0])


def test_unknown_kind():
    with pytest.raises(ValueError, match="Unknown task 'reading': known are exist, attr"):
        held_out("reading", 1)


def test_every_word_is_known(documents):
    for every in documents.values():
        for document in every:
            assert set(document.question.split()) <= set(VOCAB)


@pytest.mark.parametrize("kind", TASKS)
def test_pictures_and_evidence_match(documents, kind):
    for document in documents[kind]:
        assert len(document.evidence) == len(document.images)
        assert document.video == (kind == "video")
        for image, boxes in zip(document.images, document.evidence, strict=True):
            height, width = image.shape[:2]
            assert height % 84 == width % 84 == 0
            assert all(-8 <= x0 < x1 <= width + 8 and -8 <= y0 < y1 <= height + 8 for x0, y0, x1, y1 in boxes)


def test_what_is_read_stands_in_its_boxes(documents):
    """Each box holds the bitmap of its character: dark on a light page."""
    for document in documents["read"]:
        (boxes,) = document.evidence
        assert len(boxes) == len(document.answer)
        for character, (x0, y0, _, _) in zip(document.answer, boxes, strict=True):
            wanted = np.kron(GLYPHS[character], np.ones((2, 2))) > 0
            patch = document.images[0][int(y0) : int(y0) + 14, int(x0) : int(x0) + 10].mean(2)
            assert patch[wanted].max() < 100 < np.median(patch[~wanted])


@pytest.mark.parametrize(("kind", "most"), [("multi", 0.5), ("video", 0.45), ("read", 0.1), ("describe", 0.1)])
def test_no_answer_is_a_good_guess(documents, kind, most):
    given = Counter(document.answer for document in documents[kind])
    assert given.most_common(1)[0][1] / COUNT <= most


def scenes_of(task, number):
    rng = np.random.default_rng([Split.DEV, number])
    return sample_pictures(task, sample_size(task, rng), rng), rng


def test_answers_about_two_pictures_are_true():
    for number in range(100):
        scenes, rng = scenes_of("multi", number)
        shown = [{(item.color, item.shape) for item in scene.of("shape")} for scene in scenes]
        if (question := ask("multi", "which", scenes, rng)) is not None:
            color, shape = question.text.split()[4:6]
            there = [(color, shape) in pairs for pairs in shown]
            assert there == [question.answer == "first", question.answer == "second"]
        question = ask("multi", "how many", scenes, rng)
        shape = question.text.split()[5]
        assert question.answer == str(sum(any(s == shape for _, s in pairs) for pairs in shown))


def track(frames, color, shape):
    return [next(((i.x, i.y) for i in f.of("shape") if (i.color, i.shape) == (color, shape)), None) for f in frames]


def test_answers_about_videos_are_true():
    for number in range(100):
        frames, rng = scenes_of("video", number)
        assert len(frames) == FRAMES
        if (question := ask("video", "direction", frames, rng)) is not None:
            path = [p for p in track(frames, *question.text.split()[4:6]) if p]
            moved = np.sign(np.subtract(path[-1], path[0]).round(6))
            assert tuple(moved) == MOTIONS[question.answer]
        question = ask("video", "order", frames, rng)
        words = question.text.split()
        first, second = (track(frames, *words[at : at + 2]) for at in (2, 7))
        starts = [next(n for n, place in enumerate(path) if place) for path in (first, second)]
        assert question.answer == ("yes" if starts[0] < starts[1] else "no")
        assert starts[0] != starts[1]


def test_descriptions_name_everything_once():
    for number in range(50):
        (scene,), rng = scenes_of("describe", number)
        question = ask("describe", "describe", [scene], rng)
        named = question.answer.split(" , ")
        assert sorted(named) == sorted(f"{item.color} {item.shape}" for item in scene.of("shape"))


def test_pages_hold_one_word_and_one_number():
    for number in range(50):
        (page,), _ = scenes_of("read", number)
        assert 3 <= len(page.word) <= 5
        assert 3 <= len(page.number) <= 5
        assert page.number.isdigit()
        assert {CHARACTERS[item.value] for item in page.of("letter")} == set(page.word)
