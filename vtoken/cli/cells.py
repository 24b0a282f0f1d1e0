# SPDX-License-Identifier: Apache-2.0
"""What every command that runs cells shares: run what is missing, show the table, write the reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vtoken.cli.console import FAILED, INTERRUPTED, err, out, sentences

if TYPE_CHECKING:
    from vtoken.eval.cells import Cell
    from vtoken.eval.store import Store
    from vtoken.eval.summary import Row


def run_cells(cells: Sequence[Cell], store: Store, *, fresh: bool, show: Callable[[], None]) -> None:
    """Run and measure what is missing, then ``show()``; ends the program if it was stopped or a cell failed."""
    if fresh:
        for cell in cells:
            store.discard(cell.id)
    try:
        failed = _run(cells, store)
    except KeyboardInterrupt:
        done = sum(store.result(cell.id) is not None for cell in cells)
        err().print(f"Stopped: {done} of {len(cells)} cells are finished. The same command goes on from here.")
        raise typer.Exit(INTERRUPTED) from None
    with sentences():
        show()
    if failed:
        raise typer.Exit(FAILED)


def _run(cells: Sequence[Cell], store: Store) -> list[Cell]:
    """Run and measure what is missing; returns the cells that failed."""
    from transformers.utils.logging import disable_progress_bar

    from vtoken.cli.progress import CellProgress
    from vtoken.eval.cost import measure_cells
    from vtoken.eval.runner import Runner

    todo = [cell for cell in cells if store.result(cell.id) is None]
    if len(todo) < len(cells):
        err().print(f"{len(cells) - len(todo)} of {len(cells)} cells are there already; --fresh starts over.")
    disable_progress_bar()  # of transformers: it would tear ours
    with CellProgress(err(), len(todo)) as progress:
        runner = Runner(store, progress)
        with sentences():
            if todo:
                runner.model(todo[0])  # a model that cannot be loaded is wrong input
        outcome = runner.run(cells)
        unmeasured = measure_cells(cells, runner, before=progress.measured)
    for cell, why in unmeasured.items():
        err().print(f"The cost of {cell.label} could not be measured: {why}", markup=False, highlight=False)
    return [*outcome.failed, *unmeasured]


def show_cells(cells: Sequence[Cell], store: Store, sweep: Mapping[str, Any]) -> None:
    """Print the table of finished and failed cells and write the reports beside them."""
    from vtoken.eval.cost import BATCH
    from vtoken.eval.render import LEGEND, failures
    from vtoken.eval.report import CAVEAT, write_reports
    from vtoken.eval.summary import summarize

    rows = summarize(cells, store)
    files = write_reports(rows, store.root, sweep)
    console = out()
    console.print(build_table(rows, console))
    for line in failures(rows):
        console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
    console.print(LEGEND.format(batch=BATCH), style="dim", highlight=False)
    if any(cell.model.kind == "embedded" for cell in cells):
        console.print(CAVEAT, style="dim", highlight=False)
    console.print("Written: " + ", ".join(map(str, files)), highlight=False, markup=False, soft_wrap=True)


def build_table(rows: Sequence[Row], console: Console) -> Table:
    """The table, in the wide form if that fits."""
    from vtoken.eval.render import COLUMNS, NARROW

    wide = _columns_table(rows, COLUMNS)
    needed = console.measure(wide, options=console.options.update(max_width=1000)).maximum
    return wide if needed <= console.width else _columns_table(rows, NARROW)


def _columns_table(rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str]]) -> Table:
    from vtoken.eval.render import place_columns

    places, questions = place_columns(rows), max((row.documents for row in rows), default=0)
    title = ", ".join(dict.fromkeys(f"{row.model} on {row.task}" for row in rows)) + f", {questions} questions"
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in (*places, *columns):
        left = name in (*places, "reducer") or name.startswith("accuracy")
        table.add_column(escape(name), justify="left" if left else "right", no_wrap=name != "reducer")
    for before, row in zip((None, *rows), rows, strict=False):
        if before is not None and before.reducer != row.reducer:
            table.add_section()
        cells = [*(str(getattr(row, place)) for place in places), *(column(row) for column in columns.values())]
        table.add_row(*map(escape, cells))
    return table
