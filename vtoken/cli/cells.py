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
    from vtoken.eval.comparison.summary import Row
    from vtoken.eval.errors import EvalError
    from vtoken.eval.executors import Executor
    from vtoken.eval.model.loading import ModelSpec
    from vtoken.eval.report.columns import Column
    from vtoken.eval.store.results import Store
    from vtoken.eval.sweeps.cells import Cell


def run_cells(
    cells: Sequence[Cell],
    store: Store,
    *,
    fresh: bool,
    show: Callable[[], None],
    executor: Executor | None = None,
    unresolved: Mapping[ModelSpec, EvalError] | None = None,
) -> None:
    """Run and measure what is missing, then ``show()``; ends the program if it was stopped or a cell failed.

    Parameters
    ----------
    cells, store
        What to run, and where results are.
    fresh : bool
        Forget former results.
    show : callable
        Shows all results.
    executor : Executor, optional
        What runs; this process by default.
    unresolved : mapping, optional
        Models whose cells fail, and why, see `vtoken.eval.sweeps.plan.Pins`.
    """
    if fresh:
        for cell in cells:
            with store.lock(cell.id).attempt() as held:
                if held:  # what another runner is at is fresh
                    store.discard(cell.id)
    try:
        failed = _run(cells, store, executor, unresolved or {})
    except KeyboardInterrupt:
        done = sum(store.result(cell.id) is not None for cell in cells)
        err().print(f"Stopped: {done} of {len(cells)} cells are finished. The same command goes on from here.")
        raise typer.Exit(INTERRUPTED) from None
    with sentences():
        show()
    if failed:
        raise typer.Exit(FAILED)


def _run(
    cells: Sequence[Cell], store: Store, executor: Executor | None, unresolved: Mapping[ModelSpec, EvalError]
) -> list[Cell]:
    """Run and measure what is missing; returns the cells that failed."""
    from transformers.utils.logging import disable_progress_bar

    from vtoken.cli.progress import CellProgress
    from vtoken.eval.errors import EvalError
    from vtoken.eval.executors import get_executor
    from vtoken.eval.sweeps.plan import fail_unresolved

    executor = executor or get_executor("local")
    todo = [cell for cell in cells if store.result(cell.id) is None]
    if len(todo) < len(cells):
        err().print(f"{len(cells) - len(todo)} of {len(cells)} cells are there already; --fresh starts over.")
    disable_progress_bar()  # of transformers: it would tear ours
    with CellProgress(err(), len(todo)) as progress:
        failed = fail_unresolved(cells, unresolved, store, progress)
        sound = [cell for cell in cells if cell.model not in unresolved]
        try:
            failed += executor.run(sound, store, progress).failed
        except EvalError:  # nothing can be run
            with sentences():
                raise
        unmeasured = executor.measure(sound, store, progress.measured)
    if not executor.measures and any(store.profile(cell.id) is None for cell in sound):
        err().print("Costs are not measured by this executor: the same command with --executor local adds them.")
    for cell, why in unmeasured.items():
        err().print(f"The cost of {cell.label} could not be measured: {why}", markup=False, highlight=False)
    return [*failed, *unmeasured]


def show_cells(cells: Sequence[Cell], store: Store, sweep: Mapping[str, Any], *, by_seed: bool = False) -> None:
    """Print the table of finished and failed cells, a row a reducer or a seed, and write the reports beside them."""
    from vtoken.eval.comparison.runs import runs_of
    from vtoken.eval.comparison.seeds import over_seeds
    from vtoken.eval.comparison.summary import rows_of
    from vtoken.eval.report.columns import legend
    from vtoken.eval.report.page import CAVEAT, write_reports
    from vtoken.eval.report.published import LEGEND as PUBLISHED_LEGEND
    from vtoken.eval.report.published import beside_table
    from vtoken.eval.report.render import failures

    runs = runs_of(cells, store)
    rows = rows_of(runs if by_seed else over_seeds(runs))
    files = write_reports(rows, store.root, sweep, runs)
    console = out()
    console.print(build_table(rows, console))
    for line in failures(rows):
        console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
    console.print(legend(rows), style="dim", highlight=False, markup=False)
    if lines := beside_table(rows):
        console.print(_beside(lines))
        console.print(PUBLISHED_LEGEND, style="dim", highlight=False)
    if any(cell.model.kind == "embedded" for cell in cells):
        console.print(CAVEAT, style="dim", highlight=False)
    console.print("Written: " + ", ".join(map(str, files)), highlight=False, markup=False, soft_wrap=True)


def _beside(lines: Sequence[Sequence[str]]) -> Table:
    """Published numbers beside ours."""
    from vtoken.eval.report.published import BESIDE

    table = Table(title="Published numbers beside ours", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    for name in BESIDE:
        table.add_column(name, justify="right" if name in ("keep", "ours %", "tasks") else "left")
    for line in lines:
        table.add_row(*map(escape, line))
    return table


def build_table(rows: Sequence[Row], console: Console) -> Table:
    """The table, in the wide form if that fits."""
    from vtoken.eval.report.columns import shown

    wide = _columns_table(rows, shown(rows))
    needed = console.measure(wide, options=console.options.update(max_width=1000)).maximum
    return wide if needed <= console.width else _columns_table(rows, shown(rows, narrow=True))


def _columns_table(rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    from vtoken.eval.report.columns import lines_of

    questions = max((row.documents for row in rows), default=0)
    title = ", ".join(dict.fromkeys(f"{row.model} on {row.task}" for row in rows)) + f", {questions} questions"
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(
            escape(column.title), justify="left" if column.is_name else "right", no_wrap=not column.is_name
        )
    for before, row, cells in zip((None, *rows), rows, lines_of(columns, rows), strict=False):
        if before is not None and before.reducer != row.reducer:
            table.add_section()
        table.add_row(*map(escape, cells))
    return table
