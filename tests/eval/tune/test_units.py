# SPDX-License-Identifier: Apache-2.0
"""What is asked in which order: whole pictures, at random, each question once."""

import itertools
import json

import pytest
from taskfolder import write_task_folder

from vtoken.eval.harness.tasksource import folder_tasks, load_task
from vtoken.eval.tune.units import PER_PICTURE, Part, cut, looks, part_of, shuffled_units, within

COLORS = ("red", "green", "blue")
EACH = 6


@pytest.fixture
def folder(tmp_path):
    """Tasks about three pictures, `EACH` questions a picture; ``named`` says which picture each is about."""
    root = write_task_folder(tmp_path / "tasks", "plain", "named")
    rows = [{"question": f"question {i} ?", "answer": color} for i in range(EACH) for color in COLORS]
    (root / "questions.json").write_text(json.dumps(rows))
    (root / "named.json").write_text(json.dumps([{**row, "image_id": row["answer"]} for row in rows]))
    named = (root / "named.yaml").read_text()
    (root / "named.yaml").write_text(named.replace("questions.json", "named.json"))
    return root


@pytest.fixture(params=["plain", "named"])
def task(request, folder):
    (ref,) = folder_tasks(str(folder), [request.param])
    return ref, load_task(ref.name, "llava", ref.folder)


def test_questions_of_a_picture_are_one_unit_by_name_or_by_pixels(task):
    units = shuffled_units(task[1])
    assert sorted(sorted({i % 3 for i in unit}) for unit in units) == [[0], [1], [2]]
    assert [len(unit) for unit in units] == [PER_PICTURE] * 3
    assert len(set(itertools.chain.from_iterable(units))) == 3 * PER_PICTURE


def test_the_order_depends_on_the_seed_alone(task):
    assert shuffled_units(task[1]) == shuffled_units(task[1])
    assert len({tuple(shuffled_units(task[1], seed)) for seed in range(8)}) > 1


def test_no_more_questions_than_allowed_and_only_whole_pictures(task):
    units = shuffled_units(task[1])
    assert within(units, None) == units
    assert within(units, 2 * PER_PICTURE + 1) == units[:2]
    assert within(units, PER_PICTURE - 1) == []


def test_a_part_holds_its_documents_and_leaves_the_task_alone(task):
    ref, whole = task
    units = shuffled_units(whole)
    first, second = cut(units, [1, 3], ref)
    assert first.units + second.units == tuple(units)
    shown = part_of(whole, second)
    assert [doc["question"] for doc in shown.eval_docs] == [whole.eval_docs[i]["question"] for i in second.documents]
    assert len(whole.eval_docs) == 3 * EACH


def test_parts_are_told_apart_by_their_documents(task):
    ref, whole = task
    units = shuffled_units(whole)
    parts = [*cut(units, [1, 3], ref), Part.of(ref, units[::-1])]
    assert len({part.fingerprint for part in (ref, *parts)}) == 4
    assert Part.of(ref, units[:1]) == parts[0]


def test_a_unit_counts_with_the_mean_of_its_scores(task):
    part = Part.of(task[0], [(0, 3), (1,), (2, 5, 8)])
    assert part.documents == [0, 3, 1, 2, 5, 8]
    assert part.means([1, 0, 1, 0, 0, 1]).tolist() == pytest.approx([0.5, 1, 1 / 3])


def test_parts_grow_by_half():
    assert looks(120) == [32, 48, 72, 108, 120]
