# SPDX-License-Identifier: Apache-2.0
"""Cells: one model, one reducer, one task, fully resolved. The id is a hash of everything that decides the score."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vtoken.budget import Keep
from vtoken.eval.harness.tasksource import TaskRef
from vtoken.eval.model.loading import ModelSpec, pin
from vtoken.eval.provenance import files_digest, foreign_code, versions
from vtoken.reducers.base import KeepReducer, Reducer

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
    seed, batch_size : int
        A batch size changes the order of floating-point sums.
    """

    model: ModelSpec
    weights: str
    model_type: str
    reducer: Reducer | None
    task: TaskRef
    limit: int | None = None
    seed: int = 0
    batch_size: int = 1

    def config(self) -> dict[str, Any]:
        """Everything that decides the score, as plain data."""
        spec = self.model
        return {
            "model": {
                "pretrained": spec.pretrained,
                "weights": self.weights,
                "model_type": self.model_type,
                "dtype": spec.dtype,
                "attn_implementation": spec.attn_implementation,
                "device": spec.device_map or spec.target.split(":")[0],
                "positions": spec.positions,
                "preprocessing": spec.preprocessing,
            },
            "reducer": plain(self.reducer.config()) if self.reducer else None,
            "reducer_code": foreign_code(self.reducer),
            "reducer_files": files_digest(self.reducer),
            "task": self.task.config(),
            "limit": self.limit,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "versions": versions(),
        }

    @functools.cached_property
    def id(self) -> str:
        """Content hash of `config`."""
        text = json.dumps(self.config(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """Name of the reducer with the parameters that are not at their defaults, ``keep`` and the seed left out."""
        return label(self.reducer, self.seed)

    @property
    def keep(self) -> Keep | None:
        """The budget, where the reducer has one."""
        return getattr(self.reducer, "keep", None)


def plain(value: Any) -> Any:
    """Reducer parameters as JSON has them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def label(reducer: Reducer | None, seed: int = 0) -> str:
    """See `Cell.label`."""
    if reducer is None:
        return "unpruned"
    if stages := getattr(reducer, "reducers", None):
        return " > ".join(f"{label(stage, seed)} {getattr(stage, 'keep', '')}".strip() for stage in stages)
    usual = {"keep": getattr(reducer, "keep", None), "seed": seed}
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
    pin : callable
        Gives weights and type of a model, see `vtoken.eval.model.loading.pin`.
    """
    cells = []
    for spec in models:
        weights, kind = pin(spec)
        for task in tasks:
            cells += [Cell(spec, weights, kind, r, task, limit, seed, batch_size) for r in reducers]
    return list({cell.id: cell for cell in cells}.values())
