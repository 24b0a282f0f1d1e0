# SPDX-License-Identifier: Apache-2.0
"""``vtoken compare A B ...``: results that are there already, as one table; nothing is run."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from vtoken.cli.cells import build_table
from vtoken.cli.console import out

if TYPE_CHECKING:
    from vtoken.eval.comparison.runs import Run
    from vtoken.eval.comparison.summary import Row


class Format(StrEnum):
    """How the table is written."""

    TABLE = "table"
    CSV = "csv"
    MARKDOWN = "markdown"
    LATEX = "latex"


def compare_finished(
    names: Sequence[str], baseline: str | None, form: Format, file: Path | None, searched: Path, *, by_seed: bool
) -> None:
    """Print or write the table.

    Parameters
    ----------
    names, baseline, searched, by_seed
        See `read_rows`.
    form : Format
        What to write.
    file : Path, optional
        Where to, instead of the terminal.
    """
    rows, remarks = read_rows(names, baseline, searched, by_seed=by_seed)
    _write(rows, form, file, remarks)


def read_rows(
    names: Sequence[str], baseline: str | None, searched: Path, *, by_seed: bool = False
) -> tuple[list[Row], list[str]]:
    """All runs as rows, those of the reference first, and what cannot be compared, as sentences.

    Parameters
    ----------
    names : sequence of str
        Folders of results, of several results folders, of cells; or ids of cells.
    baseline : str, optional
        Another of these that all are compared with; the first of several by default.
    searched : Path
        Where ids of cells are looked for, besides the named folders.
    by_seed : bool
        A row for every seed instead of one over all.

    Raises
    ------
    EvalError
        If something is not there or cannot be compared.
    """
    from vtoken.eval.comparison.seeds import over_seeds
    from vtoken.eval.comparison.summary import rows_of

    given = dict.fromkeys(name for name in (baseline, *names) if name is not None)
    short = {name: Path(name).name for name in given}
    unique = len(set(short.values())) == len(given)
    sources = {(short[name] if unique else name): _read(name, given, searched) for name in given}
    if len(sources) > 1:
        sources = {
            source: [dataclasses.replace(run, source=source) for run in runs] for source, runs in sources.items()
        }
    if not by_seed:
        sources = {source: over_seeds(runs) for source, runs in sources.items()}
    references, remarks = _references(sources)
    return rows_of([run for runs in sources.values() for run in runs], references), remarks


def _read(name: str, names: Iterable[str], searched: Path) -> list[Run]:
    """The runs behind an argument."""
    from vtoken.eval.comparison.runs import find_cell, read_runs

    folders = [folder for folder in (*map(Path, names), searched) if folder.is_dir()]
    place = Path(name) if Path(name).is_dir() else find_cell(name, folders)
    return read_runs(place or Path(name))


def _references(sources: Mapping[str, Sequence[Run]]) -> tuple[dict[tuple[str, str], Run], list[str]]:
    """What each run is compared with: its twin in the first source; and what has none, as sentences.

    Raises
    ------
    EvalError
        If a source has no task in common with the first.
    """
    from vtoken.eval.errors import EvalError

    (reference, others), *rest = sources.items()
    known = {run.task for run in others}
    found, remarks = {}, []
    for name, runs in rest:
        tasks = {run.task for run in runs}
        if not tasks & known:
            has = f"{reference!r} has results of {_list(known)}, {name!r} of {_list(tasks)}"
            raise EvalError(f"{has}: they have no task in common.")
        if tasks - known:
            remarks.append(f"{name} also has results of {_list(tasks - known)}, which {reference} has not.")
        found.update({(run.source, run.id): twin for run in runs if (twin := _twin(run, others))})
    return found, remarks


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _twin(run: Run, others: Sequence[Run]) -> Run | None:
    """The same reducer at the same budget on the same task; else the only run of the task, else the unpruned one."""
    from vtoken.eval.store.record import UNPRUNED

    same_task = [other for other in others if other.task == run.task and other.samples]
    same_model = [other for other in same_task if other.model == run.model] or same_task
    same = [other for other in same_model if (other.reducer, other.keep) == (run.reducer, run.keep)]
    only = same_task if len(same_task) == 1 else [other for other in same_model if other.reducer == UNPRUNED]
    return next(iter([*same, *only]), None)


def _write(rows: Sequence[Row], form: Format, file: Path | None, remarks: Sequence[str]) -> None:
    from vtoken.eval.report.columns import legend
    from vtoken.eval.report.page import write_file
    from vtoken.eval.report.render import failures, notes

    console = out()
    if form is Format.TABLE and file is None:
        console.print(build_table(rows, console))
        for line in [*failures(rows), *notes(rows), *remarks]:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        console.print(legend(rows), style="dim", highlight=False, markup=False)
    elif file is None:
        console.print(_text(rows, form), end="", markup=False, highlight=False, soft_wrap=True)
    else:
        write_file(file, _text(rows, form))
        console.print(f"Written: {file}", highlight=False, markup=False, soft_wrap=True)


def _text(rows: Sequence[Row], form: Format) -> str:
    from rich.console import Console

    from vtoken.cli.console import PIPE_WIDTH
    from vtoken.eval.report.columns import lines_of, shown
    from vtoken.eval.report.export import as_csv, as_latex, as_markdown

    if form is Format.CSV:
        return as_csv(rows)
    if form is Format.TABLE:
        plain = Console(width=PIPE_WIDTH, file=io.StringIO())
        with plain.capture() as captured:
            plain.print(build_table(rows, plain))
        return captured.get()
    columns = shown(rows)
    lines = [[cell.strip() for cell in line] for line in lines_of(columns, rows)]
    write = as_markdown if form is Format.MARKDOWN else as_latex
    return write([column.title for column in columns], lines, [column.is_name for column in columns])
