# SPDX-License-Identifier: Apache-2.0
"""Live progress of cells, whatever runs them: bars on a terminal, a line per cell elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vtoken.cli.console import bar
from vtoken.eval.errors import first_line
from vtoken.eval.model.loading import ModelSpec
from vtoken.eval.running.listener import Listener
from vtoken.eval.store.record import Failure, Result
from vtoken.eval.sweeps.cells import Cell


class CellProgress(Listener):
    """Draws a bar for all cells, one for each cell at work with its questions, and a line of what else goes on.

    Parameters
    ----------
    console : Console
        Where to.
    total : int
        Cells that will be run.
    """

    def __init__(self, console: Console, total: int) -> None:
        times = TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times
        self.console, self.total, self.count = console, total, 0
        self.bars = bar(*columns, console=console)
        self.cells = self.bars.add_task("cells", total=total)
        self.aside = self.bars.add_task("", total=None, visible=False)
        self.questions: dict[str, TaskID] = {}

    def __enter__(self) -> CellProgress:
        self.bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bars.stop()

    def loading(self, spec: ModelSpec) -> None:
        """See `Listener`."""
        self._aside(f"loading {spec.pretrained}")

    def started(self, cell: Cell) -> None:
        """See `Listener`."""
        self._remove(cell)  # what a lost worker had answered is counted anew
        self.questions[cell.id] = self.bars.add_task(escape(_name(cell)), total=cell.limit)
        self.bars.update(self.aside, visible=False)

    def answered(self, cell: Cell, count: int) -> None:
        """See `Listener`."""
        self.bars.advance(self.questions[cell.id], count)

    def finished(self, cell: Cell, result: Result) -> None:
        """See `Listener`."""
        score = result.metrics.get(f"{result.metric},none")
        shown = "" if score is None else f"{100 * score:.1f} %, "
        self._line(cell, f"{shown}{result.seconds:.1f} s")

    def skipped(self, cell: Cell) -> None:
        """See `Listener`."""
        self._line(cell, "finished by another runner")

    def failed(self, cell: Cell, failure: Failure) -> None:
        """See `Listener`."""
        self._line(cell, f"FAILED: {first_line(failure.error)}")

    def waiting(self, cells: Sequence[Cell]) -> None:
        """See `Listener`."""
        self._aside(f"waiting for {len(cells)} cells of other runners")

    def trouble(self, text: str) -> None:
        """See `Listener`."""
        self.console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def measured(self, cell: Cell) -> None:
        """A cell's cost is measured."""
        self._aside(f"measuring {_name(cell)}")

    def _aside(self, text: str) -> None:
        self.bars.update(self.aside, description=escape(text), visible=True)

    def _remove(self, cell: Cell) -> None:
        if cell.id in self.questions:
            self.bars.remove_task(self.questions.pop(cell.id))

    def _line(self, cell: Cell, text: str) -> None:
        self.count += 1
        self._remove(cell)
        self.bars.advance(self.cells)
        if not self.console.is_terminal:
            self.console.print(f"{self.count}/{self.total} {_name(cell)}: {text}", markup=False, highlight=False)


def _name(cell: Cell) -> str:
    keep = "" if cell.keep is None else f" keep {cell.keep:g}"
    return f"{cell.label}{keep} on {cell.task.name}"
