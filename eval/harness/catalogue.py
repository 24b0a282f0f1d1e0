# SPDX-License-Identifier: Apache-2.0
"""What can be asked, what each task needs, and which of them have traps; read from task files without loading data."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vtoken.eval.errors import unknown
from vtoken.eval.harness.tasksource import OpaqueLoader, named_files, task_config, task_files

NOTES = Path(__file__).parent / "tasknotes.yaml"
JUDGED = ("OPENAI_API_KEY", "llm_judge")  # in the scoring code of a task that asks another model


@dataclass(frozen=True)
class TaskInfo:
    """One line of ``vtoken tasks``.

    Parameters
    ----------
    name : str
        As ``-t`` takes it.
    asks : str
        What kind of question, "" where nobody wrote it down.
    needs : tuple of str
        ``"login"`` to the hub, a ``"judge key"``.
    trap : str
        What goes wrong silently.
    """

    name: str
    asks: str = ""
    needs: tuple[str, ...] = ()
    trap: str = ""


def bundled() -> list[TaskInfo]:
    """Tasks that come with vtoken and need nothing; does not import lmms-eval."""
    return [TaskInfo(name, **note) for name, note in _notes()["bundled"].items()]


def notable() -> list[TaskInfo]:
    """The tasks of lmms-eval that pruning papers report on; does not import it."""
    noted = _notes()["lmms_eval"]
    files = named_files(noted)
    return [describe(name, files[name]) for name in noted if name in files]


def matching(pattern: str) -> list[TaskInfo]:
    """All tasks and groups whose name matches a pattern with wildcards.

    Raises
    ------
    EvalError
        If there is none.
    """
    files = task_files()
    own = [info for info in bundled() if fnmatch.fnmatch(info.name, pattern)]
    names = fnmatch.filter(sorted(files), pattern)
    if not own and not names:
        raise unknown("task", pattern, [*files, *(info.name for info in bundled())], "vtoken tasks '*' lists all")
    return [*own, *(describe(name, files[name]) for name in names)]


def describe(name: str, file: Path | None) -> TaskInfo:
    """Read a task of lmms-eval off its YAML file; groups without one need what their members need."""
    note = _notes()["lmms_eval"].get(name, {})
    config = task_config(file) if file else {}
    needs = []
    if (config.get("dataset_kwargs") or {}).get("token") is True:
        needs.append("login")
    if note.get("judged", True) and file and any(word in _scoring_code(config, file) for word in JUDGED):
        needs.append("judge key")
    return TaskInfo(name, note.get("asks", ""), tuple(needs), note.get("trap", ""))


def _scoring_code(config: Mapping[str, Any], file: Path) -> str:
    """Source of the module that ``process_results`` lives in."""
    module = str(config.get("process_results", "")).rpartition(".")[0]
    source = file.parent / f"{module}.py"
    return source.read_text() if module and source.is_file() else ""


@functools.cache
def _notes() -> dict[str, dict[str, dict[str, Any]]]:
    return yaml.load(NOTES.read_text(), Loader=OpaqueLoader)
