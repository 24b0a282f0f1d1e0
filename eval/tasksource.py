# SPDX-License-Identifier: Apache-2.0
"""Tasks by name: bundled ones without touching lmms-eval, the others from its own index."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vtoken.eval.errors import unknown
from vtoken.eval.harness import require, task_manager, task_object
from vtoken.eval.tasks import FOLDER, bundled_tasks

STOCK_PROMPTS = {
    "llava": "llava_hf",
    "llava_next": "llava_hf",
    "llava_onevision": "llava_hf",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "internvl": "internvl_hf",
}
"""``config.model_type`` -> the lmms-eval model whose prompts a task gives: tasks phrase questions by model name."""


@dataclass(frozen=True)
class TaskRef:
    """A task, pinned.

    Parameters
    ----------
    name : str
        As lmms-eval knows it.
    version : str
        Of the task's definition.
    fingerprint : str
        Of its data for bundled tasks, of its YAML for others (whose data are pinned by the dataset's own fingerprint,
        which the result records).
    """

    name: str
    version: str
    fingerprint: str


def resolve_tasks(names: list[str]) -> list[TaskRef]:
    """Pin tasks; groups and tags of lmms-eval are replaced by their tasks.

    Raises
    ------
    EvalError
        For an unknown name or a missing package.
    """
    require()
    bundled = bundled_tasks()
    refs: list[TaskRef] = []
    for name in names:
        refs += [_bundled(name)] if name in bundled else [_foreign(leaf) for leaf in _leaves(name)]
    return list(dict.fromkeys(refs))


def _bundled(name: str) -> TaskRef:
    from vtoken.eval.tasks.data import load_data

    shared = yaml.load((FOLDER / "shared.yaml").read_text(), Loader=_Opaque)
    return TaskRef(name, str(shared["metadata"]["version"]), load_data().fingerprint)


def foreign_tasks() -> list[str]:
    """Names of lmms-eval's own tasks and groups."""
    require()
    return list(_manager(None).all_tasks)


class _Opaque(yaml.SafeLoader):
    """Reads a task YAML without importing the functions it names."""


_Opaque.add_constructor("!function", lambda loader, node: node.value)


def _foreign(name: str) -> TaskRef:
    path = Path(_manager(None).task_index[name]["yaml_path"])
    version = f"lmms-eval {importlib.metadata.version('lmms-eval')}"
    return TaskRef(name, version, hashlib.sha256(path.read_bytes()).hexdigest())


def _leaves(name: str) -> list[str]:
    manager = _manager(None)
    if name not in manager.all_tasks:
        known = [*bundled_tasks(), *manager.all_tasks]
        raise unknown("task", name, known, "vtoken tasks lists what can be run")
    entry = manager.task_index[name]
    if entry["type"] in ("task", "python_task"):
        return [name]
    members = entry["task"]
    if members == -1:  # a group: its YAML names the members
        members = yaml.load(Path(entry["yaml_path"]).read_text(), Loader=_Opaque)["task"]
    names = [member if isinstance(member, str) else member["task"] for member in members]
    return [leaf for member in names for leaf in _leaves(member)]


@functools.cache
def load_task(name: str, model_type: str = "") -> Any:
    """The lmms-eval task object; its data are loaded once per process.

    Parameters
    ----------
    name : str
        A bundled task or one of lmms-eval.
    model_type : str
        Selects the phrasing of the prompts, see `STOCK_PROMPTS`.
    """
    prompts = STOCK_PROMPTS.get(model_type)
    manager = _bundled_manager() if name in bundled_tasks() else _manager(prompts)
    return task_object(name, manager)


@functools.cache
def _manager(prompts: str | None) -> Any:
    return task_manager(model_name=prompts)


@functools.cache
def _bundled_manager() -> Any:
    return task_manager(include_path=str(FOLDER), include_defaults=False)
