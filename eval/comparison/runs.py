# SPDX-License-Identifier: Apache-2.0
"""Finished and failed cells read back from disk: all that a comparison needs, without models, tasks or lmms-eval."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtoken.eval.errors import EvalError
from vtoken.eval.store.results import FAILURE, PROFILE, RESULT, SAMPLES, Store, read_json, read_samples
from vtoken.eval.sweeps.cells import Cell, label
from vtoken.registry import get_reducer

TABLE = "results.json"
UNPRUNED, RANDOM = "unpruned", "random"


@dataclass(frozen=True)
class Run:
    """A cell with what it left behind.

    Parameters
    ----------
    id : str
        Of the cell.
    config : mapping
        See `vtoken.eval.sweeps.cells.Cell.config`.
    reducer : str
        Its label, ``"unpruned"`` without one.
    result, profile : mapping
        ``result.json`` and ``profile.json``; empty for a cell that failed and one that was not measured.
    samples : sequence of dict
        One per document, see `vtoken.eval.harness.scores.flatten`.
    error : str
        What a failed cell raised.
    source : str
        Where it was read from, if several folders are compared.
    """

    id: str
    config: Mapping[str, Any]
    reducer: str
    result: Mapping[str, Any] = field(default_factory=dict)
    profile: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[dict[str, Any]] = ()
    error: str = ""
    source: str = ""

    @property
    def model(self) -> str:
        """Name, folder or hub id."""
        return str(self.config["model"]["pretrained"])

    @property
    def task(self) -> str:
        """Name of the task."""
        return str(self.config["task"]["name"])

    @property
    def keep(self) -> Any:
        """The budget, where the reducer has one."""
        return (self.config["reducer"] or {}).get("keep")

    @property
    def group(self) -> str:
        """Equal for the cells of one sweep that differ in their reducer only."""
        same = {key: self.config.get(key) for key in ("model", "task", "limit", "seed", "batch_size")}
        return json.dumps([self.source, same], sort_keys=True)

    @property
    def name(self) -> str:
        """Reducer and budget, for sentences."""
        return self.reducer if self.keep is None else f"{self.reducer} {self.keep:g}"


def runs_of(cells: Sequence[Cell], store: Store) -> list[Run]:
    """The finished and failed ones of these cells, in their order."""
    found = (_run(store.path(cell.id, ""), cell.config(), cell.label) for cell in cells)
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
    runs = [run for place in chosen if (run := _run(place)) is not None]
    if not any(run.result for run in runs):
        raise EvalError(f"Nothing is finished in {str(folder)!r}: run vtoken compare or vtoken sweep into it first.")
    order = {place.name: number for place, number in listed.items()}
    return sorted(runs, key=lambda run: (order.get(run.id, len(order)), *_order(run)))


def _cells(table: Path) -> list[Path]:
    """The folders of the cells of a ``results.json``."""
    return [table.parent / "cells" / str(row.get("cell")) for row in (read_json(table) or {}).get("rows", [])]


def find_cell(cell: str, folders: Sequence[Path]) -> Path | None:
    """The folder of a finished cell, by its id."""
    places = (path.parent for folder in folders for path in folder.rglob(f"{cell}/{RESULT}"))
    return next(places, None)


def _run(folder: Path, config: Any = None, name: str | None = None) -> Run | None:
    """The cell in a folder; None if it is neither finished nor failed."""
    result, failure = read_json(folder / RESULT), read_json(folder / FAILURE) or {}
    config = config or (result or failure).get("cell")
    if config is None or not (result or failure):
        return None
    name = name or _label(config["reducer"], config["seed"])
    if not result:
        return Run(folder.name, config, name, error=failure["error"] or "unknown error")
    profile = read_json(folder / PROFILE) or {}
    return Run(folder.name, config, name, result, profile, read_samples(folder / SAMPLES))


def _label(config: Mapping[str, Any] | None, seed: int) -> str:
    """As `Cell.label`; a reducer that is not registered here is shown by its name alone."""
    if config is None:
        return UNPRUNED
    try:
        return label(get_reducer(dict(config)), seed)
    except (ValueError, TypeError):
        return str(config["reducer"])


def _order(run: Run) -> tuple:
    """By model and task; the unpruned first, then the controls, then by name; large budgets first."""
    rank = (UNPRUNED, RANDOM).index(run.reducer) if run.reducer in (UNPRUNED, RANDOM) else 2
    return run.model, run.task, rank, run.reducer, -(run.keep or 0), run.id


def origins(runs: Sequence[Run]) -> list[tuple[int, Mapping[str, Any]]]:
    """What the results were made with, and by how many runs."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run.result.get("made_with"):
            found.setdefault(json.dumps(run.result["made_with"], sort_keys=True), []).append(run)
    return [(len(group), group[0].result["made_with"]) for group in found.values()]


def data_of(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Task, version, fingerprints of its definition and its data, hash of the prompts: each combination once."""
    lines = [
        (
            run.task,
            str(run.config["task"].get("version", "")),
            str(run.config["task"].get("fingerprint", "")),
            str(run.result.get("dataset", "")),
            str(run.result.get("prompts", "")),
        )
        for run in runs
        if run.result
    ]
    return list(dict.fromkeys(lines))
