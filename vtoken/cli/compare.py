# SPDX-License-Identifier: Apache-2.0
"""``vtoken compare``: reducers x keep ratios on a model and tasks, one table and a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vtoken.cli.console import FAILED, INTERRUPTED, err, out, sentences

if TYPE_CHECKING:
    from vtoken.eval.cells import Cell
    from vtoken.eval.store import Store
    from vtoken.eval.summary import Row
    from vtoken.eval.sweep import Sweep


def compare_command(
    model: Annotated[str | None, typer.Option("-m", "--model", help="Embedded model, folder or hub id.")] = None,
    tasks: Annotated[str | None, typer.Option("-t", "--tasks", help="Tasks, with commas; see vtoken tasks.")] = None,
    reducers: Annotated[
        str | None, typer.Option("-r", "--reducers", help="Names, presets or YAML files, with commas; see vtoken list.")
    ] = None,
    keep: Annotated[str | None, typer.Option("-k", "--keep", help="Ratios or token counts, with commas.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Questions per task; 320 of the bundled ones, all of others.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Prompts per forward pass; 16 for embedded models, 1 for others.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few questions, one keep ratio: seconds.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of going on.")] = False,
    folder: Annotated[Path, typer.Option("--out", help="Results folder.")] = Path("vtoken-results"),
) -> None:
    """Compare reducers; without arguments, on the embedded model and its tasks."""
    overrides = {
        "models": _items(model),
        "tasks": _items(tasks),
        "reducers": _items(reducers),
        "keep": _items(keep),
        "limit": limit,
        "batch_size": batch_size,
    }
    with sentences():
        sweep, cells, store = _prepare(overrides, quick, folder)
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
        _show(sweep, cells, store)
    if failed:
        raise typer.Exit(FAILED)


def _items(text: str | None) -> list[Any] | None:
    """A list with commas, as YAML reads it: numbers are numbers, and mappings in braces are possible."""
    if text is None:
        return None
    try:
        found = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        found = [part.strip() for part in text.split(",")]
    return [item for item in found if item is not None]


def _prepare(overrides: dict[str, Any], quick: bool, folder: Path) -> tuple[Sweep, list[Cell], Store]:
    from vtoken.eval.harness import require
    from vtoken.eval.store import Store
    from vtoken.eval.sweep import load_sweep, shipped_sweep

    require()
    sweep = load_sweep(shipped_sweep("quick" if quick else "compare"), overrides)
    sweep = sweep.model_copy(update=_defaults(sweep, overrides))
    cells = sweep.cells()
    return sweep, cells, Store(folder)


def _defaults(sweep: Sweep, overrides: dict[str, Any]) -> dict[str, Any]:
    """Limit and batch size of the shipped files are meant for bundled tasks and embedded models, not for others."""
    from vtoken.eval.tasks import bundled_tasks
    from vtoken.mini import names

    changes: dict[str, Any] = {}
    if overrides["limit"] is None and not set(sweep.tasks) <= set(bundled_tasks()):
        changes["limit"] = None
    if overrides["batch_size"] is None and not {entry.pretrained for entry in sweep.models} <= set(names()):
        changes["batch_size"] = 1
    return changes


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


def _show(sweep: Sweep, cells: Sequence[Cell], store: Store) -> None:
    from vtoken.eval.cost import BATCH
    from vtoken.eval.render import LEGEND, failures
    from vtoken.eval.report import CAVEAT, write_reports
    from vtoken.eval.summary import summarize

    rows = summarize(cells, store)
    files = write_reports(rows, store.root, sweep.model_dump(mode="json"))
    console = out()
    console.print(_table(rows, console))
    for line in failures(rows):
        console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
    console.print(LEGEND.format(batch=BATCH), style="dim", highlight=False)
    if any(cell.model.kind == "embedded" for cell in cells):
        console.print(CAVEAT, style="dim", highlight=False)
    console.print("Written: " + ", ".join(map(str, files)), highlight=False, markup=False, soft_wrap=True)


def _table(rows: Sequence[Row], console: Console) -> Table:
    """The table, in the wide form if that fits."""
    from vtoken.eval.render import COLUMNS, NARROW

    wide = _build_table(rows, COLUMNS)
    needed = console.measure(wide, options=console.options.update(max_width=1000)).maximum
    return wide if needed <= console.width else _build_table(rows, NARROW)


def _build_table(rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str]]) -> Table:
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
