# SPDX-License-Identifier: Apache-2.0
"""Entries of a sweep file: models, tasks and the executor."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from vtoken.eval.errors import EvalError, unknown
from vtoken.eval.harness.tasksource import TaskRef, folder_tasks, is_folder, resolve_tasks
from vtoken.eval.model.loading import ModelSpec


def _model(value: Any) -> Any:
    entry, known = _mapping("pretrained", value), [field.name for field in dataclasses.fields(ModelSpec)]
    for key in entry:
        if key not in known:
            raise unknown("key", key, known)
    return entry


def _existing(spec: ModelSpec) -> ModelSpec:
    _ = spec.kind  # raises for a name that is no model
    return spec


ModelEntry = Annotated[ModelSpec, BeforeValidator(_model), AfterValidator(_existing)]
"""A model of a sweep, with the keys of `ModelSpec`; a plain string stands for ``{pretrained: ...}``."""


def with_preprocessing(entry: Any, preset: Any) -> Any:
    """An entry of a model with that ``preprocessing``, unless it has one of its own."""
    found = {"pretrained": entry} if isinstance(entry, str) else entry
    if not isinstance(found, Mapping):
        return entry
    return {**found, "preprocessing": found.get("preprocessing") or preset}


class TaskEntry(BaseModel):
    """A task of a sweep; a plain string stands for ``{task: ...}``, or ``{folder: ...}`` if it has a slash in it.

    Parameters
    ----------
    task : str
        A bundled task, or a task, group or tag of lmms-eval.
    folder : str
        Instead of ``task``: a folder with lmms-eval task YAMLs.
    tasks : tuple of str
        Which of a folder's tasks, all by default.
    limit : int, optional
        Documents of each of these tasks; wins over the sweep's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str = ""
    folder: str = ""
    tasks: tuple[str, ...] = ()
    limit: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _name(cls, value: Any) -> Any:
        return _mapping("folder" if isinstance(value, str) and is_folder(value) else "task", value)

    @model_validator(mode="after")
    def _one_source(self) -> TaskEntry:
        if bool(self.task) == bool(self.folder):
            raise EvalError(f"task={self.task!r} and folder={self.folder!r} are not possible: give one of the two.")
        if self.task and self.tasks:
            raise EvalError(
                f"tasks={list(self.tasks)} is not possible with task={self.task!r}: it chooses of a folder."
            )
        return self

    @property
    def name(self) -> str:
        """The task or the folder."""
        return self.task or self.folder

    def resolve(self) -> list[TaskRef]:
        """Its tasks, pinned.

        Raises
        ------
        EvalError
            For an unknown name or folder.
        """
        return folder_tasks(self.folder, self.tasks) if self.folder else resolve_tasks([self.task])


class ExecutorEntry(BaseModel):
    """What runs the cells; a plain string stands for ``{name: ...}``. Further keys are the executor's options."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = "local"

    @model_validator(mode="before")
    @classmethod
    def _name(cls, value: Any) -> Any:
        return _mapping("name", value)

    @model_validator(mode="after")
    def _known(self) -> ExecutorEntry:
        from vtoken.eval.executors import check_options

        check_options(self.name, self.options)
        return self

    @property
    def options(self) -> dict[str, Any]:
        """All keys but the name."""
        return dict(self.model_extra or {})


def _mapping(key: str, value: Any) -> Any:
    """A name as ``{key: name}``; a mapping as it is."""
    if isinstance(value, str):
        return {key: value}
    if not isinstance(value, Mapping):
        raise EvalError(f"{value!r} is not possible: give a name, or a mapping with the key {key!r}.")
    return value
