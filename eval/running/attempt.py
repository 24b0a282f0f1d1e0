# SPDX-License-Identifier: Apache-2.0
"""One try of a cell, and how it enters the outcome of a run."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum

from vtoken.eval.errors import DocumentError, reason
from vtoken.eval.running.listener import Listener, Outcome
from vtoken.eval.store.record import Failure, Result
from vtoken.eval.sweeps.cells import Cell


class Status(Enum):
    """What became of an attempt at a cell."""

    FINISHED = "finished"
    SKIPPED = "skipped"  # it was there already
    FAILED = "failed"
    BUSY = "busy"  # another runner is at it


@dataclass(frozen=True)
class Attempt:
    """One try of a cell.

    Parameters
    ----------
    result : Result, optional
        Of a cell that finished.
    failure : Failure, optional
        Of a cell that failed.
    unloadable : str
        Why the cell's model cannot be loaded, if that is how it failed.
    wrong_input : bool
        Whether it failed in a way that another try cannot change.
    """

    status: Status
    result: Result | None = None
    failure: Failure | None = None
    unloadable: str = ""
    wrong_input: bool = False


def conclude(cell: Cell, attempt: Attempt, outcome: Outcome, listener: Listener) -> None:
    """Enter the end of a cell and tell it."""
    if attempt.result is not None:
        outcome.finished.append(cell)
        listener.finished(cell, attempt.result)
    elif attempt.status is Status.SKIPPED:
        outcome.skipped.append(cell)
        listener.skipped(cell)
    elif attempt.failure is not None:
        outcome.failed.append(cell)
        listener.failed(cell, attempt.failure)


def failure_of(error: BaseException) -> Failure:
    """What is recorded of an error."""
    trace = "".join(traceback.format_exception(error))
    documents = list(error.documents) if isinstance(error, DocumentError) else []
    return Failure(error=reason(error), traceback=trace, at=datetime.now(UTC).isoformat(), documents=documents)
