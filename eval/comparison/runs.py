# SPDX-License-Identifier: Apache-2.0
"""Finished and failed cells read back from disk: all that a comparison needs, without models, tasks or lmms-eval."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vtoken.eval.errors import EvalError
from vtoken.eval.store.files import read_json
from vtoken.eval.store.record import FAILURE, RESULT, UNPRUNED, CellRecord, ModelIdentity, TaskIdentity, read_samples
from vtoken.eval.store.results import PROFILE, Store

if TYPE_CHECKING:
    from vtoken.eval.sweeps.cells import Cell

TABLE = "results.json"
RANDOM = "random"


class Group(NamedTuple):
    """What is equal for the cells of one folder that differ in their reducer and seed only."""

    source: str
    model: ModelIdentity
    task: TaskIdentity
    limit: int | None
    batch_size: int


@dataclass(frozen=True)
class Run:
    """A cell with what it left behind.

    Parameters
    ----------
    record : CellRecord
        What it is, and its result or failure.
    samples : sequence of dict
        One per document, see `vtoken.eval.harness.scores.flatten`; none for a cell that failed.
    profile : mapping
        ``profile.json``; empty for a cell that was not measured.
    source : str
        Where it was read from, if several folders are compared.
    by_seed : sequence of float
        Accuracy of every seed, for a run that stands for several, see `vtoken.eval.comparison.seeds`.
    """

    record: CellRecord
    samples: Sequence[dict[str, Any]] = ()
    profile: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    by_seed: Sequence[float] = ()

    @property
    def id(self) -> str:
        """Of the cell."""
        return self.record.id

    @property
    def model(self) -> str:
        """Name, folder or hub id."""
        return self.record.cell.model.pretrained

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.record.cell.task.name

    @property
    def reducer(self) -> str:
        """Label of the reducer, ``"unpruned"`` without one."""
        return self.record.label

    @property
    def keep(self) -> Any:
        """The budget, where the reducer has one."""
        return self.record.keep

    @property
    def error(self) -> str:
        """What a failed cell raised, "" for a finished one."""
        failure = self.record.failure
        return (failure.error or "unknown error") if failure else ""

    @property
    def seed(self) -> int | None:
        """None for a run that stands for all seeds."""
        return self.record.cell.seed

    @property
    def group(self) -> Group:
        """Equal for the cells of one sweep that differ in their reducer and seed only."""
        cell = self.record.cell
        return Group(self.source, cell.model, cell.task, cell.limit, cell.batch_size)

    @property
    def name(self) -> str:
        """Reducer and budget, for sentences."""
        return self.reducer if self.keep is None else f"{self.reducer} {self.keep:g}"


def runs_of(cells: Sequence[Cell], store: Store) -> list[Run]:
    """The finished and failed ones of these cells, in their order."""
    found = (read_run(store.path(cell.id, "")) for cell in cells)
    return [run for run in found if run is not None]


def read_runs(folder: Path) -> list[Run]:
    """All finished and failed cells below a folder: a results folder, one that holds several, or a single cell.

    Where a results folder has a ``results.json``, only the cells of that last table count, in its order: others were
    left by former code or other options.

    Raises
    ------
    EvalError
        If there is no such folder, or nothing finished in it.
    """
    if not folder.is_dir():
        raise EvalError(f"There is no folder {str(folder)!r}: give folders of finished results, or ids of cells.")
    places = {path.parent for name in (RESULT, FAILURE) for path in folder.rglob(name)}
    listed = {cell: number for table in sorted(folder.rglob(TABLE)) for number, cell in enumerate(_cells(table))}
    chosen = [place for place in places if place in listed or not (place.parent.parent / TABLE).is_file()]
    chosen = [place for place in places if place == folder] or chosen
    runs = [run for place in chosen if (run := read_run(place)) is not None]
    if not any(run.record.result for run in runs):
        raise EvalError(f"Nothing is finished in {str(folder)!r}: run vtoken compare or vtoken sweep into it first.")
    order = {place.name: number for place, number in listed.items()}
    return sorted(runs, key=lambda run: (order.get(run.id, len(order)), *_order(run)))


def _cells(table: Path) -> list[Path]:
    """The folders of the cells of a ``results.json``; tables of older versions had a row for each."""
    data = read_json(table) or {}
    cells = data.get("cells") or [row.get("cell") for row in data.get("rows", [])]
    return [table.parent / "cells" / str(cell) for cell in cells]


def find_cell(cell: str, folders: Sequence[Path]) -> Path | None:
    """The folder of a finished or failed cell, by its id."""
    names = (RESULT, FAILURE)
    places = (path.parent for folder in folders for name in names for path in folder.rglob(f"{cell}/{name}"))
    return next(places, None)


def read_run(folder: Path) -> Run | None:
    """The cell in a folder; None if it is neither finished nor failed."""
    record = CellRecord.read(folder)
    if record is None:
        return None
    return Run(record, read_samples(folder) if record.result else (), read_json(folder / PROFILE) or {})


def _order(run: Run) -> tuple:
    """By model and task; the unpruned first, then the controls, then by name; large budgets first."""
    rank = (UNPRUNED, RANDOM).index(run.reducer) if run.reducer in (UNPRUNED, RANDOM) else 2
    return run.model, run.task, rank, run.reducer, -(run.keep or 0), run.id


def origins(runs: Sequence[Run]) -> list[tuple[int, Mapping[str, Any]]]:
    """What the results were made with, and by how many runs."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        if run.record.result and (made := run.record.made_with):
            found.setdefault(json.dumps(made, sort_keys=True), []).append(made)
    return [(len(group), group[0]) for group in found.values()]


def data_of(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Task, version, fingerprints of its definition and its data, hash of the prompts: each combination once."""
    finished = [(run.record.cell.task, found) for run in runs if (found := run.record.result)]
    lines = [(task.name, task.version, task.fingerprint, found.dataset, found.prompts) for task, found in finished]
    return list(dict.fromkeys(lines))
