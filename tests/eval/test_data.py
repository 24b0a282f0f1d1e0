# SPDX-License-Identifier: Apache-2.0
"""The bundled questions are the same everywhere, balanced, and survive a damaged cache."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vtoken.eval.tasks import bundled_tasks, data
from vtoken.mini.questions import KINDS
from vtoken.mini.world import IMAGE, VERSION

FINGERPRINT = "dc8083104808c80409adf501a3c495f4a0fa235c724ac34355db2948c70fdbb1"


@pytest.fixture(scope="module")
def questions():
    return data.load_data()


@pytest.fixture
def small(monkeypatch):
    """Few questions, so that generating them again takes no time."""
    original = data.generate
    calls = []

    def generate():
        calls.append(1)
        return original(per_kind=3)

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
    asked = Counter(q["scene"] for q in questions.questions)
    assert len(asked) == len(questions.pictures) < 2000 / 3.5
    assert max(asked.values()) == 4


def test_no_question_is_asked_twice(questions):
    assert len({(q["scene"], q["kind"]) for q in questions.questions}) == 2000


def test_pictures_are_what_the_model_expects(questions):
    pixels = np.asarray(Image.open(io.BytesIO(questions.pictures[0])))
    assert (pixels.shape, pixels.dtype) == ((IMAGE, IMAGE, 3), np.uint8)


def test_evidence_lies_in_the_picture(questions):
    boxes = [box for q in questions.questions for box in q["evidence"]]
    assert all(-1 <= x0 < x1 <= IMAGE + 1 and -1 <= y0 < y1 <= IMAGE + 1 for x0, y0, x1, y1 in boxes)


def test_the_second_load_reads_the_files(small, tmp_path):
    first = data.load_data(tmp_path)
    assert data.load_data(tmp_path) == first
    assert len(small) == 1


@pytest.mark.parametrize("name", [data.QUESTIONS, data.PICTURES, data.MANIFEST])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_damaged_files_are_generated_again(small, tmp_path, name, damage):
    first = data.load_data(tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert data.load_data(tmp_path) == first
    assert data.load_data(tmp_path) == first
    assert len(small) == 2


def test_a_cache_that_cannot_be_written_only_costs_time(small, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert len(data.load_data(tmp_path / "file" / "cache").questions) == 24
    assert "cannot be kept" in caplog.text


def test_every_kind_has_a_task():
    assert set(bundled_tasks()) == {"mini", *(f"mini_{kind}" for kind in KINDS)}
