# SPDX-License-Identifier: Apache-2.0
"""Sweeps: a grid of models x tasks x reducers x keep ratios, read from YAML, checked, expanded into cells."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vtoken.budget import Keep, check_keep
from vtoken.eval.arguments import read_reducer
from vtoken.eval.cells import Cell, grid, with_keeps
from vtoken.eval.errors import EvalError, unknown
from vtoken.eval.loading import ModelSpec
from vtoken.eval.tasksource import resolve_tasks
from vtoken.reducers.base import Reducer


class ModelEntry(BaseModel):
    """A model of a sweep; a plain string stands for ``{pretrained: ...}``."""

    model_config = ConfigDict(extra="forbid")

    pretrained: str
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None
    attn_implementation: str | None = None


class Sweep(BaseModel):
    """What a sweep file holds.

    Parameters
    ----------
    models : list
        Names, or mappings with the fields of `ModelEntry`.
    tasks : list of str
        Names of bundled or lmms-eval tasks.
    reducers : list
        Names, presets, or mappings with the key ``reducer`` and its parameters. The unpruned model is always there.
    keep : list of float or int
        Budgets; every reducer that has one is run at each.
    limit : int, optional
        Documents per task; all by default.
    seed, batch_size : int
        As in `vtoken.eval.cells.Cell`.
    """

    model_config = ConfigDict(extra="forbid")

    models: list[ModelEntry] = Field(min_length=1)
    tasks: list[str] = Field(min_length=1)
    reducers: list[str | dict[str, Any]] = Field(min_length=1)
    keep: list[float | int | str] = Field(min_length=1)
    limit: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    batch_size: int = Field(default=1, ge=1)

    @field_validator("models", mode="before")
    @classmethod
    def _names_are_models(cls, models: Any) -> Any:
        if not isinstance(models, list):
            return models
        return [{"pretrained": model} if isinstance(model, str) else model for model in models]

    @property
    def budgets(self) -> list[Keep]:
        """``keep``, checked."""
        return [check_keep(keep) for keep in self.keep]

    def points(self) -> list[Reducer | None]:
        """Every reducer at every budget, the unpruned model first.

        Raises
        ------
        ValueError
            For an unknown reducer or parameter, or an impossible budget.
        """
        budgets = self.budgets
        found: list[Reducer | None] = [None]
        for spec in self.reducers:
            if (reducer := read_reducer(spec)) is not None:
                found += with_keeps(reducer, budgets)
        return found

    def cells(self) -> list[Cell]:
        """The grid, resolved.

        Raises
        ------
        ValueError
            If any name or value in it is wrong.
        """
        points = self.points()
        models = [ModelSpec(**entry.model_dump()) for entry in self.models]
        return grid(
            models,
            resolve_tasks(self.tasks),
            points,
            limit=self.limit,
            seed=self.seed,
            batch_size=self.batch_size,
        )


def load_sweep(path: Path, overrides: Mapping[str, Any] | None = None) -> Sweep:
    """Read a sweep file.

    Parameters
    ----------
    path : Path
        YAML.
    overrides : mapping, optional
        Values that win over the file's; None stands for "as in the file".

    Raises
    ------
    EvalError
        Naming file, key, value and what is allowed.
    """
    try:
        found = yaml.safe_load(path.read_text())
    except OSError as error:
        raise EvalError(f"The sweep file {str(path)!r} cannot be read: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise EvalError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, Mapping):
        raise EvalError(f"{path} must hold a mapping with the keys {', '.join(Sweep.model_fields)}.")
    given = {**found, **{key: value for key, value in (overrides or {}).items() if value is not None}}
    try:
        return Sweep(**given)
    except ValidationError as error:
        first = error.errors()[0]
        where = "" if (overrides or {}).get(str(first["loc"][0])) is not None else f"{path}: "
        raise EvalError(where + _sentence(first)) from None


def _sentence(error: Any) -> str:
    """One of pydantic's error records in words."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = ModelEntry.model_fields if error["loc"][0] == "models" else Sweep.model_fields
        return str(unknown("key", str(error["loc"][-1]), known))
    if error["type"] == "missing":
        return f"the key {key!r} is missing."
    return f"{key}={error['input']!r} is not possible: {error['msg'][0].lower()}{error['msg'][1:]}."


def shipped_sweep(name: str) -> Path:
    """A sweep that comes with the package."""
    import vtoken.configs

    return Path(vtoken.configs.__path__[0]) / "sweeps" / f"{name}.yaml"
