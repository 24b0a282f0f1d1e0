# SPDX-License-Identifier: Apache-2.0
"""``vtoken sweep``: the cells of a YAML file, listed or run, resumed where they were left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from vtoken.cli.cells import run_cells, show_cells
from vtoken.cli.console import err, out, sentences

if TYPE_CHECKING:
    from vtoken.eval.errors import EvalError
    from vtoken.eval.executors import Executor
    from vtoken.eval.model.loading import ModelSpec
    from vtoken.eval.sweeps.cells import Cell
    from vtoken.eval.sweeps.sweep import Sweep


def sweep_command(
    file: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped sweep such as llava15.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells; run and download nothing.")] = False,
    executor: Annotated[
        str | None, typer.Option(help="What runs the cells: local, accelerate or ray; the file's by default.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster, such as auto.")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions per task; wins over all limits in the file.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Results folder; by default the file's, or vtoken-results/NAME.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of going on.")] = False,
    skip_broken: Annotated[
        int | None, typer.Option(help="Unreadable documents that a cell may leave out; 0 by default.")
    ] = None,
    by_seed: Annotated[bool, typer.Option("--by-seed", help="A row for every seed instead of one over all.")] = False,
) -> None:
    """Run the sweep of a YAML file; stop it, run it again, and it goes on."""
    with sentences():
        from vtoken.eval.harness.driver import require
        from vtoken.eval.store.results import Store
        from vtoken.eval.sweeps.plan import Pins
        from vtoken.eval.sweeps.sweep import load_sweep

        require()
        path = _find(file)
        sweep = load_sweep(path, {"limit": limit, "skip_broken": skip_broken}).limited(limit)
        worker = _executor(sweep, executor or sweep.executor.name, address)
        pins = Pins(offline=dry_run)
        cells = sweep.cells(pins)
        root = folder or Path(sweep.out or f"vtoken-results/{path.stem}")
        if dry_run:
            return _show_plan(cells, root, pins.problems)
        if len(pins.problems) == len({cell.model for cell in cells}):
            raise next(iter(pins.problems.values()))
        store = Store(root)
    settings = sweep.model_dump(mode="json", exclude_defaults=True)
    show = lambda: show_cells(cells, store, settings, by_seed=by_seed)  # noqa: E731
    run_cells(cells, store, fresh=fresh, show=show, executor=worker, unresolved=pins.problems)


def _find(file: str) -> Path:
    from vtoken.eval.sweeps.sweep import shipped_sweep

    return Path(file) if Path(file).is_file() or file.endswith((".yaml", ".yml")) else shipped_sweep(file)


def _executor(sweep: Sweep, name: str, address: str | None) -> Executor:
    """The executor of that name; the options in the file are meant for the file's."""
    from vtoken.eval.executors import get_executor

    options = sweep.executor.options if name == sweep.executor.name else {}
    given = {"address": address, "empty_limit": sweep.empty_limit, "skip_broken": sweep.skip_broken}
    return get_executor(name, **options, **{key: value for key, value in given.items() if value is not None})


def _show_plan(cells: Sequence[Cell], root: Path, problems: Mapping[ModelSpec, EvalError]) -> None:
    """Print the cells with their states, their count and how long they may take."""
    from vtoken.eval.store.results import Store
    from vtoken.eval.sweeps.plan import State, estimate, states

    store = Store(root) if root.is_dir() else None
    found = states(cells, store)
    console = out()
    console.print(_plan_table(cells, [state.value for state in found], problems))
    counts = Counter(found)
    parts = ", ".join(f"{counts[state]} {state.value}" for state in State)
    console.print(f"{len(cells)} cells: {parts}; results folder {root}", highlight=False, markup=False, soft_wrap=True)
    left = [cell for cell, state in zip(cells, found, strict=True) if state is not State.FINISHED]
    seconds, unknown = estimate(left, store)
    if seconds:
        without = f", {len(unknown)} cells not counted: nothing of their model is finished yet" if unknown else ""
        console.print(f"About {timedelta(seconds=round(seconds))} on one worker{without}.", highlight=False)
    for spec, problem in problems.items():
        note = f"{spec.pretrained} is not resolved: its config is not in the local cache. A run fetches it."
        text = note if spec.kind == "hub" else str(problem)
        err().print(text, highlight=False, markup=False, soft_wrap=True)


def _plan_table(cells: Sequence[Cell], found: Sequence[str], problems: Mapping[ModelSpec, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for title in ("model", "task", "reducer", "keep", "seed", "state"):
        table.add_column(title, justify="right" if title in ("keep", "seed") else "left", no_wrap=title != "reducer")
    for cell, state in zip(cells, found, strict=True):
        keep = "" if cell.keep is None else f"{cell.keep:g}"
        shown = f"{state}, not resolved" if cell.model in problems else state
        seed = "any" if cell.seed is None else str(cell.seed)
        table.add_row(*map(escape, (cell.model.pretrained, cell.task.name, cell.label, keep, seed, shown)))
    return table
