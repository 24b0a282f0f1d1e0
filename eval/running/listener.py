# SPDX-License-Identifier: Apache-2.0
"""What a run of cells tells while it goes on, and what came out of it in the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vtoken.eval.model.loading import ModelSpec
from vtoken.eval.store.record import Failure, Result
from vtoken.eval.sweeps.cells import Cell


class Listener:
    """Told what happens, by all workers of a run in one thread; override what is of interest."""

    def loading(self, spec: ModelSpec) -> None:
        """A model is being loaded."""

    def started(self, cell: Cell) -> None:
        """A cell begins, or begins again in its middle."""

    def answered(self, cell: Cell, count: int) -> None:
        """``count`` more documents are answered."""

    def finished(self, cell: Cell, result: Result) -> None:
        """A cell is saved."""

    def skipped(self, cell: Cell) -> None:
        """Another runner has finished a cell meanwhile; those that are there at the start of a run are not told."""

    def failed(self, cell: Cell, failure: Failure) -> None:
        """A cell raised."""

    def waiting(self, cells: Sequence[Cell]) -> None:
        """All that is left is being run by other runners."""

    def trouble(self, text: str) -> None:
        """Something went wrong that costs time but no result."""


@dataclass
class Outcome:
    """Cells that were run, that were there already or finished by another runner, and that failed."""

    finished: list[Cell] = field(default_factory=list)
    skipped: list[Cell] = field(default_factory=list)
    failed: list[Cell] = field(default_factory=list)
