# SPDX-License-Identifier: Apache-2.0
"""Tasks in a folder of the user's: found, pinned by all that is in the folder, and run."""

import pytest
from taskfolder import COLORS, write_task_folder

from vtoken.eval.errors import EvalError
from vtoken.eval.harness.tasksource import folder_tasks, load_task, resolve_tasks


@pytest.fixture
def folder(tmp_path):
    return write_task_folder(tmp_path / "tasks", "colors", "more_colors")


def test_all_tasks_of_a_folder_or_those_named(folder):
    assert sorted(task.name for task in resolve_tasks([str(folder)])) == ["colors", "more_colors"]
    assert [task.name for task in folder_tasks(str(folder), ["more_colors"])] == ["more_colors"]


def test_the_fingerprint_is_of_the_content_not_of_the_place(folder, tmp_path):
    (before,) = folder_tasks(str(folder), ["colors"])
    moved = folder.rename(tmp_path / "moved")
    (same,) = folder_tasks(str(moved), ["colors"])
    assert same.identity == before.identity
    (moved / "utils.py").write_text((moved / "utils.py").read_text() + "\n")
    (other,) = folder_tasks(str(moved), ["colors"])
    assert other.fingerprint != before.fingerprint


def test_a_group_of_the_folder(folder):
    (folder / "both.yaml").write_text("group: both\ntask: [colors, more_colors]\n")
    assert [task.name for task in folder_tasks(str(folder), ["both"])] == ["colors", "more_colors"]


def test_it_loads_with_its_own_functions_and_data(folder):
    (task,) = folder_tasks(str(folder), ["colors"])
    loaded = load_task(task.name, "llava", task.folder)
    assert [doc["answer"] for doc in loaded.eval_docs] == list(COLORS)
    assert loaded.doc_to_visual(loaded.eval_docs[2])[0].getpixel((0, 0)) == (0, 0, 255)


def test_wrong_folders_are_a_sentence(folder, tmp_path):
    with pytest.raises(EvalError, match=r"There is no task folder '.*nowhere'"):
        resolve_tasks([str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvalError, match="defines no lmms-eval task"):
        resolve_tasks([str(tmp_path / "empty")])
    with pytest.raises(EvalError, match="Unknown task 'color': did you mean 'colors'"):
        folder_tasks(str(folder), ["color"])
