# SPDX-License-Identifier: Apache-2.0
"""Live progress of cells: bars on a terminal, a line per cell elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vtoken.eval.cells import Cell
from vtoken.eval.loading import ModelSpec
from vtoken.eval.runner import Listener


class CellProgress(Listener):
    """Draws two bars: cells, and questions of the one at work.

    Parameters
    ----------
    console : Console
        Where to.
    total : int
        Cells that will be run.
    """

    def __init__(self, console: Console, total: int) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self.console, self.total, self.count = console, total, 0
        self.bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.cells = self.bars.add_task("cells", total=total)
        self.questions = self.bars.add_task("", total=None, visible=False)

    def __enter__(self) -> CellProgress:
        self.bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bars.stop()

    def loading(self, spec: ModelSpec) -> None:
        """See `Listener`."""
        self.bars.update(self.questions, description=f"loading {escape(spec.pretrained)}", visible=True)

    def started(self, cell: Cell) -> None:
        """See `Listener`."""
        self.bars.reset(self.questions, description=escape(_name(cell)), total=cell.limit, visible=True)

    def answered(self, cell: Cell, count: int) -> None:
        """See `Listener`."""
        self.bars.advance(self.questions, count)

    def finished(self, cell: Cell, result: dict[str, Any]) -> None:
        """See `Listener`."""
        score = result["metrics"].get(f"{result['metric']},none")
        shown = "" if score is None else f"{100 * score:.1f} %, "
        self._line(cell, f"{shown}{result['seconds']:.1f} s")

    def failed(self, cell: Cell, failure: dict[str, Any]) -> None:
        """See `Listener`."""
        self._line(cell, f"FAILED: {(failure['error'].splitlines() or ['unknown error'])[0]}")

    def measured(self, cell: Cell) -> None:
        """A cell's cost is measured."""
        self.bars.update(self.questions, description=f"measuring {escape(_name(cell))}", total=None, visible=True)

    def _line(self, cell: Cell, text: str) -> None:
        self.count += 1
        self.bars.advance(self.cells)
        if not self.console.is_terminal:
            self.console.print(f"{self.count}/{self.total} {_name(cell)}: {text}", markup=False, highlight=False)


def _name(cell: Cell) -> str:
    keep = "" if cell.keep is None else f" keep {cell.keep:g}"
    return f"{cell.label}{keep} on {cell.task.name}"
