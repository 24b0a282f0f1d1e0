# SPDX-License-Identifier: Apache-2.0
"""Cells: one model, one reducer, one task, fully resolved. The id is a hash of everything that decides the score."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vtoken.budget import Keep
from vtoken.eval.errors import EvalError
from vtoken.eval.harness.tasksource import LOCAL, TaskRef
from vtoken.eval.model.loading import ModelSpec, pin, weights_id
from vtoken.eval.provenance import files_digest, foreign_code, surroundings, versions
from vtoken.eval.store.record import UNPRUNED, CellRecord, Failure, Identity, ModelIdentity, Recipe, Result
from vtoken.reducers.base import KeepReducer, Reducer
from vtoken.registry import get_reducer

UNRESOLVED = "unresolved"
"""Stands for the weights of a model whose config cannot be read, such as one of the hub without network."""


@dataclass(frozen=True)
class Cell:
    """One point of a sweep.

    Parameters
    ----------
    model : ModelSpec
        What to load.
    weights : str
        What pins it, see `vtoken.eval.model.loading.weights_id`.
    model_type : str
        Selects adapter and prompts.
    reducer : Reducer or None
        None is the unpruned model.
    task : TaskRef
        What to ask.
    limit : int or None
        How many documents of it.
    seed : int or None
        None stands for all seeds, see `vtoken.eval.store.record.Identity`.
    batch_size : int
        It changes the order of floating-point sums.
    """

    model: ModelSpec
    weights: str
    model_type: str
    reducer: Reducer | None
    task: TaskRef
    limit: int | None = None
    seed: int | None = 0
    batch_size: int = 1

    @functools.cached_property
    def identity(self) -> Identity:
        """Everything that decides the score."""
        spec = self.model
        return Identity(
            model=ModelIdentity(
                pretrained=spec.pretrained,
                weights=self.weights,
                model_type=self.model_type,
                dtype=spec.dtype,
                attn_implementation=spec.attn_implementation,
                device=spec.device_map or spec.target.split(":")[0],
                positions=spec.positions,
                preprocessing=spec.preprocessing,
            ),
            reducer=plain(self.reducer.config()) if self.reducer else None,
            reducer_code=foreign_code(self.reducer),
            reducer_files=files_digest(self.reducer),
            task=self.task.identity,
            limit=self.limit,
            seed=self.seed,
            batch_size=self.batch_size,
            versions=versions(),
        )

    @functools.cached_property
    def id(self) -> str:
        """Content hash of `identity`."""
        return self.identity.digest

    def record(self, result: Result | None = None, failure: Failure | None = None) -> CellRecord:
        """The record of this cell, and of what became of it here."""
        recipe = Recipe(device=self.model.device, device_map=self.model.device_map, task_folder=self.task.folder)
        found: dict[str, Any] = {"result": result, "failure": failure, "made_with": surroundings()}
        return CellRecord(id=self.id, cell=self.identity, recipe=recipe, label=self.label, **found)

    @classmethod
    def of(cls, record: CellRecord) -> Cell:
        """The cell that a record tells how to run again, by this code; a model of the hub at the recorded commit.

        Raises
        ------
        EvalError, ValueError
            If there is no such model, its reducer is not known here, or its task was in a folder that an old record
            does not name.
        """
        known, recipe = record.cell, record.recipe
        if known.task.version == LOCAL and not recipe.task_folder:
            raise EvalError(
                f"The record of cell {record.id} does not say in which folder its task {known.task.name!r} is defined, "
                "as older versions of vtoken did not: run it anew."
            )
        model = known.model.model_dump(exclude={"weights", "model_type", "device"})
        spec = ModelSpec(**model, device=recipe.device, device_map=recipe.device_map)
        if spec.kind == "hub":
            spec = dataclasses.replace(spec, revision=known.model.weights)
        return cls(
            model=spec,
            weights=known.model.weights,
            model_type=known.model.model_type,
            reducer=None if known.reducer is None else get_reducer(dict(known.reducer)),
            task=TaskRef(**known.task.model_dump(), folder=recipe.task_folder),
            limit=known.limit,
            seed=known.seed,
            batch_size=known.batch_size,
        )

    @property
    def label(self) -> str:
        """Name of the reducer with the parameters that are not at their defaults, ``keep`` and the seed left out."""
        return label(self.reducer, self.seed)

    @property
    def keep(self) -> Keep | None:
        """The budget, where the reducer has one."""
        return getattr(self.reducer, "keep", None)


def check_weights(cell: Cell) -> None:
    """Make sure that the model of a recorded cell is still what it was; one of the hub is loaded at its commit.

    Raises
    ------
    EvalError
        If its files have changed.
    """
    if cell.model.kind != "hub" and weights_id(cell.model) != cell.weights:
        name = cell.model.pretrained
        raise EvalError(f"The weights of {name!r} are no longer those of the results: restore them, or run it anew.")


def plain(value: Any) -> Any:
    """Reducer parameters as JSON has them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def label(reducer: Reducer | None, seed: int | None = 0) -> str:
    """See `Cell.label`."""
    if reducer is None:
        return UNPRUNED
    if stages := getattr(reducer, "reducers", None):
        return " > ".join(f"{label(stage, seed)} {getattr(stage, 'keep', '')}".strip() for stage in stages)
    usual = {"keep": getattr(reducer, "keep", None)} | ({} if seed is None else {"seed": seed})
    changed = [
        str(value) if isinstance(value, str) else f"{field.name}={value}"
        for field in dataclasses.fields(reducer)
        if field.init and (value := getattr(reducer, field.name)) != usual.get(field.name, field.default)
    ]
    return f"{reducer.name} ({', '.join(changed)})" if changed else reducer.name


def with_keeps(reducer: Reducer, keeps: Sequence[Keep]) -> list[Reducer]:
    """The reducer at each budget; just itself if it has none."""
    if not isinstance(reducer, KeepReducer):
        return [reducer]
    return [dataclasses.replace(reducer, keep=keep) for keep in keeps]


def grid(
    models: Iterable[ModelSpec],
    tasks: Sequence[TaskRef],
    reducers: Sequence[Reducer | None],
    *,
    limit: int | None = None,
    seed: int = 0,
    free: Collection[Reducer | None] = (),
    batch_size: int = 1,
    pin: Callable[[ModelSpec], tuple[str, str]] = pin,
) -> list[Cell]:
    """All combinations, each once, ordered so that models and tasks change least often.

    Parameters
    ----------
    models, tasks, reducers
        What to combine.
    limit, seed, batch_size
        See `Cell`.
    free : collection of Reducer or None
        Those that no seed changes: their cells of tasks that do not draw stand for all seeds.
    pin : callable
        Gives weights and type of a model, see `vtoken.eval.model.loading.pin`.
    """
    cells = []
    for spec in models:
        weights, kind = pin(spec)
        for task in tasks:
            for reducer in reducers:
                its_seed = None if reducer in free and not task.draws else seed
                cells.append(Cell(spec, weights, kind, reducer, task, limit, its_seed, batch_size))
    return list({cell.id: cell for cell in cells}.values())
