# SPDX-License-Identifier: Apache-2.0
"""The bundled questions are the same everywhere, balanced, and survive a damaged cache."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vtoken.eval.harness.tasksource import load_task
from vtoken.eval.tasks import bundled_tasks, data
from vtoken.mini.documents import FRAMES, TASKS, held_out
from vtoken.mini.questions import KINDS
from vtoken.mini.world import IMAGE, VERSION

FINGERPRINT = "806d9d434c2de4bdacc439741d6da8fb1de57c86f111fa662f8bb3ba8a61cff4"


@pytest.fixture(scope="module")
def questions():
    return data.load_data()


@pytest.fixture
def small(monkeypatch):
    """Few questions, so that generating them again takes no time."""
    original = data.generate
    calls = []

    def generate(name):
        calls.append(name)
        return original(name, per_kind=3, per_task=4)

    monkeypatch.setattr(data, "generate", generate)
    monkeypatch.setattr(data, "load_data", data.load_data.__wrapped__)
    return calls


def test_the_content_is_pinned(questions):
    assert (VERSION, questions.fingerprint) == (1, FINGERPRINT), "raise vtoken.mini.world.VERSION with the content"


def test_any_prefix_is_balanced(questions):
    assert len(questions.questions) == 2000
    for size in (8, 40, 320, 2000):
        assert Counter(q["kind"] for q in questions.questions[:size]) == dict.fromkeys(KINDS, size // 8)


def test_about_four_questions_share_a_picture(questions):
    asked = Counter(q["pictures"][0] for q in questions.questions)
    assert len(asked) == len(questions.pictures) < 2000 / 3.5
    assert max(asked.values()) == 4


def test_no_question_is_asked_twice(questions):
    assert len({(q["pictures"][0], q["kind"]) for q in questions.questions}) == 2000


def test_pictures_are_what_the_model_expects(questions):
    pixels = np.asarray(Image.open(io.BytesIO(questions.pictures[0])))
    assert (pixels.shape, pixels.dtype) == ((IMAGE, IMAGE, 3), np.uint8)


def test_evidence_lies_in_the_picture(questions):
    boxes = [box for q in questions.questions for box in q["evidence_boxes"][0]]
    assert all(-1 <= x0 < x1 <= IMAGE + 1 and -1 <= y0 < y1 <= IMAGE + 1 for x0, y0, x1, y1 in boxes)


def test_the_second_load_reads_the_files(small, tmp_path):
    first = data.load_data(folder=tmp_path)
    assert data.load_data(folder=tmp_path) == first
    assert len(small) == 1


@pytest.mark.parametrize("name", [data.QUESTIONS, data.PICTURES, data.MANIFEST])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_damaged_files_are_generated_again(small, tmp_path, name, damage):
    first = data.load_data(folder=tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert data.load_data(folder=tmp_path) == first
    assert data.load_data(folder=tmp_path) == first
    assert len(small) == 2


def test_a_cache_that_cannot_be_written_only_costs_time(small, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert len(data.load_data(folder=tmp_path / "file" / "cache").questions) == 24
    assert "cannot be kept" in caplog.text


def test_every_set_has_a_task():
    assert set(bundled_tasks()) == {"mini", *(f"mini_{name}" for name in TASKS)}


@pytest.mark.parametrize("name", TASKS)
def test_documents_come_back_from_the_files(small, tmp_path, name):
    first = data.load_data(name, folder=tmp_path)
    assert data.load_data(name, folder=tmp_path) == first
    assert small == [name]
    for row, document in zip(first.questions, held_out(name, 4), strict=True):
        assert (row["text"], row["answer"], row["video"]) == (document.question, document.answer, name == "video")
        shown = [np.asarray(Image.open(io.BytesIO(first.pictures[n]))) for n in row["pictures"]]
        assert all(np.array_equal(a, b) for a, b in zip(shown, document.images, strict=True))
        assert [len(boxes) for boxes in row["evidence_boxes"]] == [len(boxes) for boxes in document.evidence]


def test_a_clip_is_one_video_and_a_pair_is_two_pictures(private_cache):
    from vtoken.eval.tasks.mini import doc_to_messages

    def visual(name):
        docs = load_task(f"mini_{name}").eval_docs
        return [part for part in doc_to_messages(docs[0])[0]["content"] if part["type"] != "text"]

    (clip,) = visual("video")
    assert clip["type"] == "video"
    assert clip["url"].shape == (FRAMES, 84, 84, 3)
    assert [part["type"] for part in visual("multi")] == ["image", "image"]


@pytest.mark.parametrize(
    ("said", "score"),
    [("red circle , blue ring", 1.0), ("blue ring, Red circle", 1.0), ("red circle", 2 / 3), ("red ring", 0), ("", 0)],
)
def test_descriptions_are_scored_by_what_they_name(said, score):
    from vtoken.eval.tasks.mini import content_f1

    assert content_f1({"answer": "red circle , blue ring"}, [said])["content_f1"] == pytest.approx(score)
