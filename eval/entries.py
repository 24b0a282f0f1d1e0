# SPDX-License-Identifier: Apache-2.0
"""Entries of a sweep file: models, tasks and the executor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vtoken.eval.errors import EvalError, unknown
from vtoken.eval.loading import ModelSpec
from vtoken.eval.tasksource import TaskRef, folder_tasks, is_folder, resolve_tasks


class ModelEntry(BaseModel):
    """A model of a sweep; a plain string stands for ``{pretrained: ...}``.

    Parameters
    ----------
    pretrained, revision, dtype, device, device_map, attn_implementation, positions
        As in `vtoken.eval.loading.ModelSpec`.
    preprocessing : str, optional
        As there; the sweep's by default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pretrained: str
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None
    attn_implementation: str | None = None
    positions: str = "keep"
    preprocessing: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _name(cls, value: Any) -> Any:
        return _mapping("pretrained", value)

    @model_validator(mode="after")
    def _exists(self) -> ModelEntry:
        _ = self.spec().kind  # raises for a name that is no model
        return self

    def spec(self, preprocessing: str = "checkpoint") -> ModelSpec:
        """The entry as the rest of the package has it."""
        return ModelSpec(**{**self.model_dump(), "preprocessing": self.preprocessing or preprocessing})


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
        from vtoken.eval.executors import options

        known = options(self.name)
        for option in self.options:
            if option not in known:
                raise unknown(f"{self.name} executor option", option, known)
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
