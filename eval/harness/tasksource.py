# SPDX-License-Identifier: Apache-2.0
"""Tasks by name: bundled ones without touching lmms-eval, others from its own index or from a folder of the user's."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vtoken.eval.errors import EvalError, unknown
from vtoken.eval.harness.driver import require, task_folder, task_manager, task_object
from vtoken.eval.provenance import folder_digest
from vtoken.eval.store.record import TaskIdentity
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


LOCAL = "local"
"""Version of tasks of a folder."""
_TASKS = ("task", "python_task")
_DRAWING = ("random", "shuffle", "llm_judge", "OPENAI_API_KEY")  # what code says that draws, or asks a model that does
_NAME = re.compile(r"^(?:task|group): *[\"']?([^\s\"'#]+)", re.MULTILINE)  # in a task YAML


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
        Of its data for bundled tasks, of all files for those of a folder, of its YAML for others (whose data are
        pinned by the dataset's own fingerprint, which the result records).
    folder : str
        Where a task of the user's is defined, "" for others. The fingerprint pins what is in it, so that it may move.
    draws : bool
        Whether a seed might change what is asked, answered or scored, see `may_draw`. It decides nothing itself.
    """

    name: str
    version: str
    fingerprint: str
    folder: str = ""
    draws: bool = field(default=True, compare=False, kw_only=True)

    @property
    def identity(self) -> TaskIdentity:
        """What decides the score."""
        return TaskIdentity(name=self.name, version=self.version, fingerprint=self.fingerprint)


def resolve_tasks(names: Sequence[str]) -> list[TaskRef]:
    """Pin tasks; groups and tags of lmms-eval are replaced by their tasks, a folder by those that it defines.

    Raises
    ------
    EvalError
        For an unknown name or a missing package.
    """
    require()
    bundled = bundled_tasks()
    refs: list[TaskRef] = []
    for name in names:
        if is_folder(name):
            refs += folder_tasks(name)
        else:
            refs += [_bundled(name)] if name in bundled else [_foreign(leaf) for leaf in _leaves(name, _manager(None))]
    return list(dict.fromkeys(refs))


def is_folder(name: str) -> bool:
    """Whether a name is meant as a folder: no task of lmms-eval has a slash in its name."""
    return "/" in name or os.sep in name


def folder_tasks(folder: str, names: Sequence[str] = ()) -> list[TaskRef]:
    """Pin tasks that a folder defines by lmms-eval task YAMLs: those named, or all.

    Raises
    ------
    EvalError
        If there is no such folder, or no such task in it.
    """
    require()
    root = Path(folder).resolve()
    if not root.is_dir():
        raise EvalError(f"There is no task folder {folder!r}: give one with lmms-eval task YAMLs, or a task's name.")
    manager = _folder_manager(str(root), None)
    defined = [name for name in manager.all_tasks if manager.task_index[name]["type"] in _TASKS]
    if not defined:
        raise EvalError(f"The folder {folder!r} defines no lmms-eval task: put YAML files with the key 'task' into it.")
    leaves = [leaf for name in names or defined for leaf in _leaves(name, manager)]
    digest = _folder_digest(root)
    files = {leaf: Path(manager.task_index[leaf]["yaml_path"]) for leaf in leaves}
    return [TaskRef(leaf, LOCAL, digest, str(root), draws=may_draw(file)) for leaf, file in files.items()]


def as_it_is_now(ref: TaskRef) -> TaskRef:
    """The same task, pinned by its present definition and data.

    Raises
    ------
    EvalError
        If it is no longer there.
    """
    (found,) = folder_tasks(ref.folder, [ref.name]) if ref.folder else resolve_tasks([ref.name])
    return found


def _folder_digest(root: Path) -> str:
    """Of all files, hidden ones and bytecode left out."""

    def counts(path: Path) -> bool:
        parts = path.relative_to(root).parts
        return path.is_file() and "__pycache__" not in parts and not any(part.startswith(".") for part in parts)

    return folder_digest(root, filter(counts, root.rglob("*")))


def _bundled(name: str) -> TaskRef:
    from vtoken.eval.tasks.data import MIXED, load_data, version

    config = yaml.load((FOLDER / f"{name}.yaml").read_text(), Loader=OpaqueLoader)
    data = (config.get("dataset_kwargs") or {}).get("name", MIXED)
    return TaskRef(name, str(version(data)), load_data(data).fingerprint, draws=False)


def named_files(names: Collection[str]) -> dict[str, Path]:
    """The YAML files of some of lmms-eval's own tasks and groups, in a fraction of the time that its index takes."""
    paths = [(folder, file) for folder, _, files in os.walk(task_folder()) for file in files if file.endswith(".yaml")]
    paths.sort(key=lambda path: path[1].removesuffix(".yaml") not in names)  # most files are named like their task
    found: dict[str, Path] = {}
    for path in itertools.starmap(Path, paths):
        if len(found) == len(names):
            break
        for name in _NAME.findall(path.read_text(encoding="utf-8")):
            if name in names:
                found.setdefault(name, path)
    return found


def task_files() -> dict[str, Path | None]:
    """Names of lmms-eval's own tasks, groups and tags, with the YAML file that defines each; tags have none."""
    require()
    index = _manager(None).task_index
    paths = {name: index[name].get("yaml_path") for name in _manager(None).all_tasks}
    return {name: Path(path) if isinstance(path, (str, Path)) else None for name, path in paths.items()}


class OpaqueLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # libyaml, if it is there
    """Reads a task YAML without importing the functions it names."""


OpaqueLoader.add_constructor("!function", lambda loader, node: node.value)


def _foreign(name: str) -> TaskRef:
    path = Path(_manager(None).task_index[name]["yaml_path"])
    version = f"lmms-eval {importlib.metadata.version('lmms-eval')}"
    return TaskRef(name, version, hashlib.sha256(path.read_bytes()).hexdigest(), draws=may_draw(path))


def may_draw(file: Path) -> bool:
    """Whether a task might depend on a seed: it samples answers or examples, or the code beside its YAML might draw."""
    config = task_config(file)
    if ((config.get("generation_kwargs") or {}).get("temperature") or 0) > 0 or config.get("num_fewshot"):
        return True
    return any(word in code.read_text(encoding="utf-8") for code in file.parent.glob("*.py") for word in _DRAWING)


def task_config(file: Path) -> dict[str, Any]:
    """A task's YAML with what it includes; functions stay the names that the file gives them."""
    found = yaml.load(file.read_text(), Loader=OpaqueLoader)
    config = dict(found) if isinstance(found, Mapping) else {}
    include = config.pop("include", None)
    if not include:
        return config
    return {**task_config(file.parent / include), **config}


def _leaves(name: str, manager: Any) -> list[str]:
    if name not in manager.all_tasks:
        known = [*bundled_tasks(), *manager.all_tasks] if manager is _manager(None) else manager.all_tasks
        raise unknown("task", name, known, "vtoken tasks lists what can be run")
    entry = manager.task_index[name]
    if entry["type"] in _TASKS:
        return [name]
    members = entry["task"]
    if members == -1:  # a group: its YAML names the members
        members = yaml.load(Path(entry["yaml_path"]).read_text(), Loader=OpaqueLoader)["task"]
    names = [member if isinstance(member, str) else member["task"] for member in members]
    return [leaf for member in names for leaf in _leaves(member, manager)]


@functools.cache
def load_task(name: str, model_type: str = "", folder: str = "") -> Any:
    """The lmms-eval task object; its data are loaded once per process.

    Parameters
    ----------
    name : str
        A bundled task, one of lmms-eval or one of ``folder``.
    model_type : str
        Selects the phrasing of the prompts, see `STOCK_PROMPTS`.
    folder : str
        As in `TaskRef`.
    """
    prompts = STOCK_PROMPTS.get(model_type)
    if folder:
        manager = _folder_manager(folder, prompts)
    else:
        manager = _folder_manager(str(FOLDER), None) if name in bundled_tasks() else _manager(prompts)
    return task_object(name, manager)


@functools.cache
def _manager(prompts: str | None) -> Any:
    return task_manager(model_name=prompts)


@functools.cache
def _folder_manager(folder: str, prompts: str | None) -> Any:
    return task_manager(include_path=folder, include_defaults=False, model_name=prompts)
