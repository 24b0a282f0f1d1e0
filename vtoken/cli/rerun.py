# SPDX-License-Identifier: Apache-2.0
"""``vtoken rerun``: a cell once more, from its record alone, beside what is recorded."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vtoken.cli.compare import FOLDER
from vtoken.cli.console import FAILED, INTERRUPTED, err, out, sentences

if TYPE_CHECKING:
    from vtoken.eval.comparison.runs import Run
    from vtoken.eval.comparison.sameness import Difference


def rerun_command(
    cell: Annotated[str, typer.Argument(help="Folder of a finished or failed cell, or its id.")],
    results: Annotated[Path, typer.Option("--results", help="Where ids are looked for.")] = FOLDER,
    target: Annotated[
        Path | None, typer.Option("--out", help="Results folder of the new run; by default it is thrown away.")
    ] = None,
) -> None:
    """Run a cell again from its record and say what differs.

    Exit code 1 if a score, an answer or a token count does; other versions or another machine alone are only named.
    """
    with sentences():
        then = _read(cell, results)
        with tempfile.TemporaryDirectory(prefix="vtoken-rerun-") as scratch:
            try:
                now = _run(then, target or Path(scratch))
            except KeyboardInterrupt:
                raise typer.Exit(INTERRUPTED) from None
        from vtoken.eval.comparison.sameness import differences

        found = differences(then, now)
    _show(then, now, found)
    if any(one.is_result for one in found):
        raise typer.Exit(FAILED)


def _read(name: str, results: Path) -> Run:
    from vtoken.eval.comparison.runs import find_cell, read_run
    from vtoken.eval.errors import EvalError

    place = Path(name) if Path(name).is_dir() else find_cell(name, [results])
    found = read_run(place) if place else None
    if found is None:
        raise EvalError(f"There is no finished or failed cell {name!r}: give its folder, or its id and --results.")
    return found


def _run(then: Run, folder: Path) -> Run:
    from transformers.utils.logging import disable_progress_bar

    from vtoken.cli.progress import CellProgress
    from vtoken.eval.harness.driver import require
    from vtoken.eval.running.rerun import recorded, rerun

    require()
    disable_progress_bar()
    cell = recorded(then.record)
    with CellProgress(err(), 1) as progress:
        return rerun(then.record, cell, folder, progress)


def _show(then: Run, now: Run, found: Sequence[Difference]) -> None:
    from vtoken.eval.errors import first_line

    console, result = out(), now.record.result
    what = f"{len(now.samples)} documents" if result else f"failed: {first_line(now.error)}"
    results = [one for one in found if one.is_result]
    verdict = "results differ" if results else "scores, answers and token counts as recorded"
    lines = [f"{then.name} on {then.task}, cell {then.id}: {what}; {verdict}."]
    lines += [f"  {one}" for one in found]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
