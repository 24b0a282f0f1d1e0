# SPDX-License-Identifier: Apache-2.0
"""Runs a cell again from its record alone, with the code and the task as they are now."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from vtoken.eval.comparison.runs import Run, read_run
from vtoken.eval.errors import EvalError
from vtoken.eval.harness.tasksource import as_it_is_now
from vtoken.eval.running.listener import Listener
from vtoken.eval.running.runner import Runner
from vtoken.eval.store.record import CellRecord
from vtoken.eval.store.results import Store
from vtoken.eval.sweeps.cells import Cell, check_weights

ANY_NUMBER = 1.0  # of empty answers: how many there may be was decided when the record was made


def recorded(record: CellRecord) -> Cell:
    """The cell that a record tells how to run, of the task as it is now.

    Raises
    ------
    EvalError, ValueError
        If its model, task or reducer is no longer there, or the weights have changed.
    """
    cell = Cell.of(record)
    check_weights(cell)
    return dataclasses.replace(cell, task=as_it_is_now(cell.task))


def rerun(record: CellRecord, cell: Cell, folder: Path, listener: Listener | None = None) -> Run:
    """Run a recorded cell into a results folder; it may leave out as many documents as it did.

    Raises
    ------
    EvalError
        If its model cannot be loaded, or another runner is at the cell.
    """
    store = Store(folder)
    skipped = len(record.result.left_out) if record.result else 0
    Runner(store, listener, empty_limit=ANY_NUMBER, skip_broken=skipped).run([cell])
    found = read_run(store.path(cell.id, ""))
    if found is None:
        raise EvalError(f"Cell {cell.id} left nothing in {str(folder)!r}: is another process working there?")
    return found
