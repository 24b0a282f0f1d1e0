# SPDX-License-Identifier: Apache-2.0
"""``vtoken tune``: the cheapest setting that keeps the accuracy, with its confidence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from vtoken.cli.console import FAILED, INTERRUPTED, err, items, out, sentences

if TYPE_CHECKING:
    from vtoken.eval.store.results import Store
    from vtoken.eval.sweeps.cells import Cell
    from vtoken.eval.tune.tuning import Tuned


def tune_command(
    model: Annotated[str | None, typer.Option("-m", "--model", help="Embedded model, folder or hub id.")] = None,
    tasks: Annotated[str | None, typer.Option("-t", "--tasks", help="Tasks, with commas; see vtoken tasks.")] = None,
    retain: Annotated[float, typer.Option(help="Share of the unpruned model's accuracy that must be kept.")] = 0.98,
    objective: Annotated[
        str, typer.Option(help="What is to be cheap: ttft (time to first token), prefill, kv or tokens.")
    ] = "ttft",
    reducers: Annotated[
        str | None, typer.Option("-r", "--reducers", help="Names, presets or YAML files, with commas; see vtoken list.")
    ] = None,
    keep: Annotated[str | None, typer.Option("-k", "--keep", help="Ratios or token counts, with commas.")] = None,
    max_questions: Annotated[int | None, typer.Option(help="Of each task; all by default.", min=1)] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Prompts per forward pass; 16 for embedded models, 1 for others.")
    ] = None,
    file: Annotated[Path, typer.Option("--out", help="The preset that is written.")] = Path("tuned.yaml"),
    folder: Annotated[
        Path, typer.Option("--results", help="Answers, costs, plot and numbers; the same command goes on from there.")
    ] = Path("vtoken-tune"),
) -> None:
    """Find the cheapest setting that keeps the accuracy; ends in a preset for wrap.

    Exit code 1 if none is found.
    """
    overrides = {
        "models": items(model),
        "tasks": items(tasks),
        "reducers": items(reducers),
        "keep": items(keep),
        "batch_size": batch_size,
    }
    with sentences():
        from vtoken.eval.tune.tuning import check_objective, check_target

        check_target(retain)
        check_objective(objective)
        cells, store = _prepare(overrides, folder)
    tuned = _tune(cells, store, retain=retain, objective=objective, questions=max_questions)
    with sentences():
        _show(tuned, folder, file)
    if tuned.best is None:
        raise typer.Exit(FAILED)


def _prepare(overrides: dict[str, Any], folder: Path) -> tuple[dict[str, list[Cell]], Store]:
    from vtoken.eval.harness.driver import require
    from vtoken.eval.store.results import Store
    from vtoken.eval.sweeps.sweep import load_sweep, shipped_sweep
    from vtoken.eval.tune.tuning import candidates
    from vtoken.mini import names

    require()
    sweep = load_sweep(shipped_sweep("tune"), overrides)
    if overrides["batch_size"] is None and not {entry.pretrained for entry in sweep.models} <= set(names()):
        sweep = sweep.model_copy(update={"batch_size": 1})
    return candidates(sweep.cells()), Store(folder)


def _tune(cells: dict[str, list[Cell]], store: Store, **options: Any) -> Tuned:
    from transformers.utils.logging import disable_progress_bar

    from vtoken.cli.race import RaceProgress
    from vtoken.eval.tune.tuning import tune

    disable_progress_bar()  # of transformers: it would tear ours
    try:
        with sentences(), RaceProgress(err()) as progress:
            return tune(cells, store, listener=progress, **options)
    except KeyboardInterrupt:
        err().print("Stopped. The same command goes on from here.")
        raise typer.Exit(INTERRUPTED) from None


def _show(tuned: Tuned, folder: Path, file: Path) -> None:
    from vtoken.eval.report.page import CAVEAT
    from vtoken.eval.tune import outcome
    from vtoken.eval.tune.page import write
    from vtoken.mini import names

    console, files = out(), write(tuned, folder, file)
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column in outcome.COLUMNS:
        left = column in ("reducer", "retained [bounds]", "")
        grid.add_column(escape(column), justify="left" if left else "right", no_wrap=column != "reducer")
    for row in outcome.table(tuned):
        grid.add_row(*map(escape, row))
    console.print(grid)
    console.print(outcome.legend(tuned), style="dim", highlight=False)
    if tuned.model in names():
        console.print(CAVEAT, style="dim", highlight=False)
    for sentence in outcome.sentences(tuned):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    console.print("Written: " + ", ".join(map(str, files)), highlight=False, markup=False, soft_wrap=True)
