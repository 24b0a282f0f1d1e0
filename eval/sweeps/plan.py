# SPDX-License-Identifier: Apache-2.0
"""Before a sweep runs: models that cannot be read, the state of its cells, and how long the rest may take."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from enum import Enum

from vtoken.eval.errors import EvalError
from vtoken.eval.model.loading import ModelSpec, pin
from vtoken.eval.running.attempt import failure_of
from vtoken.eval.running.listener import Listener
from vtoken.eval.store.results import Store
from vtoken.eval.sweeps.cells import UNRESOLVED, Cell


class State(Enum):
    """What there is of a cell."""

    FINISHED = "finished"
    FAILED = "failed"
    TODO = "to do"


class Pins:
    """Pins models for `Sweep.cells`, and collects those that cannot be read instead of raising.

    Parameters
    ----------
    offline : bool
        Ask the local cache alone for models of the hub.

    Attributes
    ----------
    problems : dict
        Models that cannot be read, with the reason.
    """

    def __init__(self, offline: bool = False) -> None:
        self.offline = offline
        self.problems: dict[ModelSpec, EvalError] = {}

    def __call__(self, spec: ModelSpec) -> tuple[str, str]:
        """Weights and type; `UNRESOLVED` and "" for a model that cannot be read."""
        try:
            return pin(spec, offline=self.offline)
        except EvalError as error:
            self.problems[spec] = error
            return UNRESOLVED, ""


def fail_unresolved(
    cells: Sequence[Cell], problems: Mapping[ModelSpec, EvalError], store: Store, listener: Listener
) -> list[Cell]:
    """Record the failure of cells whose model cannot be read; forget former such failures of the others."""
    failed = []
    for cell in cells:
        if cell.model not in problems:
            store.discard(dataclasses.replace(cell, weights=UNRESOLVED, model_type="").id)
            continue
        failure = failure_of(problems[cell.model])
        store.save_failure(cell.record(failure=failure))
        listener.failed(cell, failure)
        failed.append(cell)
    return failed


def states(cells: Sequence[Cell], store: Store | None) -> list[State]:
    """The state of each cell; ``store`` is None if there is no results folder yet."""
    return [_state(cell, store) for cell in cells]


def _state(cell: Cell, store: Store | None) -> State:
    if store is None:
        return State.TODO
    if store.result(cell.id) is not None:
        return State.FINISHED
    return State.TODO if store.failure(cell.id) is None else State.FAILED


def estimate(cells: Sequence[Cell], store: Store | None) -> tuple[float, list[Cell]]:
    """How long cells may take, one after the other, by the cells that are finished in the folder.

    A cell is expected to take what a document took on the same model and task, or else on the same model.

    Returns
    -------
    seconds : float
        For the cells with something to go by.
    unknown : list of Cell
        The others.
    """
    seconds: dict[tuple[str, ...], list[float]] = defaultdict(list)
    documents: dict[str, int] = defaultdict(int)
    for found in store.records() if store else ():
        result, model, task = found.result, found.cell.model.pretrained, found.cell.task.name
        if result is None or not result.documents:
            continue
        for key in ((model, task), (model,)):
            seconds[key].append(result.seconds / result.documents)
        if found.cell.limit is None:
            documents[task] = result.documents
    total, unknown = 0.0, []
    for cell in cells:
        model, task = cell.model.pretrained, cell.task.name
        rates = seconds.get((model, task)) or seconds.get((model,))
        count = min(filter(None, (cell.limit, documents.get(task))), default=0)
        if rates and count:
            total += count * sum(rates) / len(rates)
        else:
            unknown.append(cell)
    return total, unknown
