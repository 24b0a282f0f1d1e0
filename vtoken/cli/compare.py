# SPDX-License-Identifier: Apache-2.0
"""``vtoken compare``: reducers x keep ratios on a model and tasks, or results that are there already, as one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vtoken.cli.cells import run_cells, show_cells
from vtoken.cli.console import items, sentences
from vtoken.cli.finished import Format, compare_finished

if TYPE_CHECKING:
    from vtoken.eval.store.results import Store
    from vtoken.eval.sweeps.cells import Cell
    from vtoken.eval.sweeps.sweep import Sweep

FOLDER = Path("vtoken-results")


def compare_command(
    results: Annotated[
        list[str] | None, typer.Argument(help="Finished results: folders, or ids of cells; nothing is run.")
    ] = None,
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
    every: Annotated[bool, typer.Option("--all", help="Every reducer at two keep ratios: some ten minutes.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of going on.")] = False,
    skip_broken: Annotated[
        int | None, typer.Option(help="Unreadable documents that a cell may leave out; 0 by default.")
    ] = None,
    target: Annotated[
        Path | None, typer.Option("--out", help=f"Results folder, {FOLDER}; with RESULTS the file for the table.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="With RESULTS: what all are compared with, the first by default.")
    ] = None,
    form: Annotated[Format | None, typer.Option("--format", help="With RESULTS; table by default.")] = None,
    by_seed: Annotated[
        bool, typer.Option("--by-seed", help="With RESULTS: a row for every seed instead of one over all.")
    ] = False,
) -> None:
    """Compare reducers; without arguments, on the embedded model and its tasks.

    With RESULTS, compare what is finished: vtoken compare A B.
    """
    overrides = {
        "models": items(model),
        "tasks": items(tasks),
        "reducers": items(reducers),
        "keep": items(keep),
        "limit": limit,
        "batch_size": batch_size,
        "skip_broken": skip_broken,
    }
    with sentences():
        if results:
            _nothing_else({**overrides, "quick": quick or None, "all": every or None, "fresh": fresh or None})
            return compare_finished(results, baseline, form or Format.TABLE, target, FOLDER, by_seed=by_seed)
        if baseline or form or by_seed:
            given = "--baseline" if baseline else "--format" if form else "--by-seed"
            raise ValueError(f"{given} is for finished results: name them, as in vtoken compare {FOLDER}.")
        if quick and every:
            raise ValueError("--quick and --all are two different sets of reducers: give one of them.")
        from vtoken.eval.executors import get_executor

        name = "quick" if quick else "all" if every else "compare"
        sweep, cells, store = _prepare(overrides, name, target or FOLDER)
        worker = get_executor("local", skip_broken=sweep.skip_broken or 0)
    show = lambda: show_cells(cells, store, sweep.model_dump(mode="json"))  # noqa: E731
    run_cells(cells, store, fresh=fresh, show=show, executor=worker)


def _nothing_else(options: dict[str, Any]) -> None:
    """Options that say what to run have no place beside results that are there already."""
    for name, value in options.items():
        if value is not None:
            option = f"--{name}".removesuffix("s" * (name == "models")).replace("_", "-")
            raise ValueError(f"{option} says what to run, but finished results are given and nothing is run: omit one.")


def _prepare(overrides: dict[str, Any], name: str, folder: Path) -> tuple[Sweep, list[Cell], Store]:
    from vtoken.eval.harness.driver import require
    from vtoken.eval.store.results import Store
    from vtoken.eval.sweeps.sweep import load_sweep, shipped_sweep

    require()
    sweep = load_sweep(shipped_sweep(name), overrides)
    sweep = sweep.model_copy(update=_defaults(sweep, overrides))
    cells = sweep.cells()
    return sweep, cells, Store(folder)


def _defaults(sweep: Sweep, overrides: dict[str, Any]) -> dict[str, Any]:
    """Limit and batch size of the shipped files are meant for bundled tasks and embedded models, not for others."""
    from vtoken.eval.tasks import bundled_tasks
    from vtoken.mini import names

    changes: dict[str, Any] = {}
    if overrides["limit"] is None and not {entry.name for entry in sweep.tasks} <= set(bundled_tasks()):
        changes["limit"] = None
    if overrides["batch_size"] is None and not {entry.pretrained for entry in sweep.models} <= set(names()):
        changes["batch_size"] = 1
    return changes
