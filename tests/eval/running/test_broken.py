# SPDX-License-Identifier: Apache-2.0
"""Documents that cannot be read: named, and left out only where that is allowed, and counted."""

import dataclasses
import json

import pytest
from PIL import Image
from taskfolder import COLORS, FUNCTIONS, TASK

from vtoken.eval.comparison.summary import summarize
from vtoken.eval.harness.tasksource import folder_tasks
from vtoken.eval.report.columns import shown
from vtoken.eval.running.cost import measure_cells
from vtoken.eval.running.runner import Runner
from vtoken.eval.store.results import Store

BROKEN = (1, 2)


@pytest.fixture
def cells(make_cell, tmp_path):
    """The unpruned and a pruned cell of four questions, two of whose pictures end in their middle."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for number, color in enumerate(COLORS):
        path = folder / f"{number}.png"
        Image.new("RGB", (144, 144), color).save(path)
        if number in BROKEN:
            path.write_bytes(path.read_bytes()[:60])
    questions = [
        {"question": "what color is the square ?", "answer": color, "path": str(folder / f"{number}.png")}
        for number, color in enumerate(COLORS)
    ]
    (folder / "questions.json").write_text(json.dumps(questions))
    (folder / "utils.py").write_text(
        FUNCTIONS.replace('Image.new("RGB", (144, 144), doc["answer"])', 'Image.open(doc["path"])')
    )
    (folder / "colors.yaml").write_text(TASK.format(name="colors", data=folder / "questions.json"))
    (task,) = folder_tasks(str(folder))
    return [
        dataclasses.replace(make_cell(name, limit=None, batch_size=3, **keep), task=task)
        for name, keep in ((None, {}), ("random", {"keep": 0.25}))
    ]


def test_a_bad_picture_fails_the_cell_and_is_named(cells, tmp_path):
    store = Store(tmp_path / "out")
    assert Runner(store).run(cells[:1]).failed == cells[:1]
    failure = store.failure(cells[0].id)
    assert failure.documents == [1]
    assert failure.error.startswith("document 1 of task 'colors': ")
    assert "Traceback" in failure.traceback
    assert Runner(store, skip_broken=1).run(cells[:1]).failed == cells[:1], "one may be left out, two are broken"
    assert store.failure(cells[0].id).documents == [2]


def test_as_many_as_allowed_are_left_out_and_counted(cells, tmp_path):
    store = Store(tmp_path / "out")
    runner = Runner(store, empty_limit=1.0, skip_broken=2)
    assert runner.run(cells).finished == cells
    for cell in cells:
        result = store.result(cell.id)
        assert (result.documents, set(result.left_out)) == (2, set(BROKEN))
        assert all(f"document {number} of task 'colors'" in why for number, why in result.left_out.items())
        assert [sample["doc_id"] for sample in store.samples(cell.id)] == [0, 3]
        right = sum(sample["score"] for sample in store.samples(cell.id)) / 2
        assert result.metrics["exact_match,none"] == pytest.approx(right), "lmms-eval does not score them either"
    assert measure_cells(cells, runner) == {}
    rows = summarize(cells, store)
    (column,) = [column for column in shown(rows) if column.title == "left out"]
    assert [column.text(row) for row in rows] == ["2", "2"]
    assert "left out" not in [column.title for column in shown([dataclasses.replace(row, left_out=0) for row in rows])]
