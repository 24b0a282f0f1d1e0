# SPDX-License-Identifier: Apache-2.0
"""Sweeps: a grid of models x tasks x reducers x keep ratios x seeds, read from YAML, checked, expanded into cells."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from vtoken.budget import Keep, check_keep
from vtoken.eval.errors import EvalError, unknown
from vtoken.eval.harness.tasksource import TaskRef
from vtoken.eval.model.loading import ModelSpec, pin
from vtoken.eval.model.preprocessing import PRESETS
from vtoken.eval.provenance import foreign_code
from vtoken.eval.sweeps.cells import Cell, grid
from vtoken.eval.sweeps.entries import ExecutorEntry, ModelEntry, TaskEntry, with_preprocessing
from vtoken.eval.sweeps.points import expand, points
from vtoken.eval.sweeps.sweepfile import anchored, checked, read_mapping
from vtoken.reducers.base import Reducer


def _check_reducer(spec: Any) -> Any:
    expand(spec)
    return spec


class Sweep(BaseModel):
    """What a sweep file holds. Relative paths in it start at the file's own folder.

    Parameters
    ----------
    models : list
        Names, or mappings with the fields of `vtoken.eval.model.loading.ModelSpec`.
    tasks : list
        Names, folders, or mappings with the fields of `TaskEntry`.
    reducers : list
        Entries as in `vtoken.eval.sweeps.points.expand`. The unpruned model is always there.
    keep : list of float or int
        Budgets; every reducer that has one and was given none of its own is run at each. By default its default.
    limit : int, optional
        Documents per task; all by default.
    seeds : list of int
        Of lmms-eval and of reducers that draw at random: what a seed can change is run for each, the rest once.
    batch_size : int
        Prompts per forward pass.
    preprocessing : str
        As in `ModelSpec`, for all models that do not say it themselves.
    executor : str or mapping
        A name, or a mapping with the key ``name`` and options, see `vtoken.eval.executors`.
    empty_limit : float, optional
        Share of empty answers above which a cell fails; the executor's default otherwise.
    skip_broken : int, optional
        Documents that cannot be read which a cell may leave out; the executor's default otherwise.
    out : str, optional
        Results folder.
    """

    model_config = ConfigDict(extra="forbid")

    models: list[ModelEntry] = Field(min_length=1)
    tasks: list[TaskEntry] = Field(min_length=1)
    reducers: list[Annotated[Any, AfterValidator(_check_reducer)]] = Field(min_length=1)
    keep: list[Annotated[Any, AfterValidator(check_keep)]] = Field(default=[], min_length=1)
    limit: int | None = Field(default=None, ge=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1)
    batch_size: int = Field(default=1, ge=1)
    preprocessing: str = PRESETS[0]
    executor: ExecutorEntry = ExecutorEntry()
    empty_limit: float | None = Field(default=None, ge=0, le=1)
    skip_broken: int | None = Field(default=None, ge=0)
    out: str | None = None
    _where: str = PrivateAttr(default="")

    @model_validator(mode="before")
    @classmethod
    def _shared_preprocessing(cls, data: dict[str, Any]) -> dict[str, Any]:
        preset, models = data.get("preprocessing", PRESETS[0]), data.get("models")
        if preset not in PRESETS or not isinstance(models, list):  # refused below
            return data
        return {**data, "models": [with_preprocessing(entry, preset) for entry in models]}

    @field_validator("preprocessing")
    @classmethod
    def _known_preset(cls, name: str) -> str:
        if name not in PRESETS:
            raise unknown("preprocessing", name, PRESETS)
        return name

    @property
    def budgets(self) -> list[Keep]:
        """``keep``, checked."""
        return list(self.keep)

    def points(self, seed: int = 0) -> list[Reducer | None]:
        """Every reducer at every budget, the unpruned model first."""
        return points(self.reducers, self.budgets, seed)

    def cells(self, pin: Callable[[ModelSpec], tuple[str, str]] = pin) -> list[Cell]:
        """The grid, resolved; see `vtoken.eval.sweeps.cells.grid` for ``pin``.

        Raises
        ------
        EvalError
            If there is no such task, or ``pin`` raises.
        """
        pin, cells = functools.cache(pin), {}
        tasks = self._tasks()
        for spec in self.models:
            for task, limit in tasks:
                for seed in self.seeds:
                    options: dict[str, Any] = {"limit": limit, "seed": seed, "batch_size": self.batch_size}
                    found = grid([spec], [task], self.points(seed), free=self._free(seed), pin=pin, **options)
                    cells.update({cell.id: cell for cell in found})
        return list(cells.values())

    def _free(self, seed: int) -> set[Reducer | None]:
        """The reducers that another seed would not change."""
        pairs = zip(self.points(seed), self.points(seed + 1), strict=True)
        return {mine for mine, other in pairs if mine == other and not foreign_code(mine)}

    def _tasks(self) -> list[tuple[TaskRef, int | None]]:
        found: dict[TaskRef, int | None] = {}
        for number, entry in enumerate(self.tasks):
            try:
                found.update(dict.fromkeys(entry.resolve(), entry.limit or self.limit))
            except EvalError as error:
                raise EvalError(f"{self._where}tasks[{number}]: {error}") from None
        return list(found.items())

    def limited(self, limit: int | None) -> Sweep:
        """The same with that many documents of every task; None changes nothing."""
        if limit is None:
            return self
        tasks = [entry.model_copy(update={"limit": None}) for entry in self.tasks]
        return self.model_copy(update={"limit": limit, "tasks": tasks})


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
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    found = anchored(read_mapping(path, Sweep.model_fields), path.parent)
    sweep = checked(Sweep, {**found, **given}, path, given)
    sweep._where = "" if "tasks" in given else f"{path}: "
    return sweep


def shipped_sweeps() -> dict[str, Path]:
    """Sweeps that come with the package, by name."""
    import vtoken.configs

    return {path.stem: path for path in sorted((Path(vtoken.configs.__path__[0]) / "sweeps").glob("*.yaml"))}


def shipped_sweep(name: str) -> Path:
    """A sweep that comes with the package.

    Raises
    ------
    EvalError
        For an unknown name.
    """
    known = shipped_sweeps()
    if name not in known:
        raise unknown("sweep", name, known)
    return known[name]
