# SPDX-License-Identifier: Apache-2.0
"""What a comparison leaves behind: ``report.html``, ``results.json`` and ``results.csv``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtoken.eval.comparison.runs import Run, data_of, origins
from vtoken.eval.comparison.summary import Row
from vtoken.eval.errors import EvalError, MissingExtraError
from vtoken.eval.provenance import surroundings
from vtoken.eval.report.columns import Column, legend, lines_of, shown
from vtoken.eval.report.export import as_csv, values_of
from vtoken.eval.report.plot import pareto_html, plotly_script
from vtoken.eval.report.published import BESIDE, beside_table
from vtoken.eval.report.published import LEGEND as PUBLISHED_LEGEND
from vtoken.eval.report.render import failures, notes
from vtoken.eval.report.tables import FLIPS, WINS, WINS_LEGEND, kinds_columns, wins_table
from vtoken.eval.store.files import dump, write_atomic

if TYPE_CHECKING:
    from vtoken.eval.report.pictures import Picture

CAVEAT = (
    "The embedded models exist to compare reducers and to test them: they see an artificial picture world, and their "
    "numbers do not predict those of a 7B model."
)


def write_reports(
    rows: Sequence[Row], folder: Path, settings: Mapping[str, Any], runs: Sequence[Run] = ()
) -> list[Path]:
    """Write the three files.

    Parameters
    ----------
    rows : sequence of Row
        All rows of the comparison.
    folder : Path
        Where to.
    settings : mapping
        How it was run, for the record: limit, seed, batch size and the like.
    runs : sequence of Run
        What the rows were made of: the page says where they come from.

    Raises
    ------
    EvalError
        If a file cannot be written.
    """
    data: dict[str, Any] = {"settings": settings, "rows": [values_of(row) for row in rows]}
    data |= {"cells": [run.id for run in runs], "made_with": surroundings()}
    hint = f"vtoken report {folder} adds the worst regressions as pictures."
    contents = {
        "report.html": render_html(rows, settings, runs, remarks=[hint]),
        "results.json": dump(data),
        "results.csv": as_csv(rows),
    }
    return [write_file(folder / name, text) for name, text in contents.items()]


def write_file(path: Path, text: str) -> Path:
    """Write one of the files.

    Raises
    ------
    EvalError
        If that is not possible.
    """
    try:
        write_atomic(path, text)
    except OSError as error:
        raise EvalError(f"The file {str(path)!r} cannot be written: {error.strerror}.") from None
    return path


def template(what: str, file: Path) -> Any:
    """The template of a page in which everything that came from data is escaped.

    Raises
    ------
    MissingExtraError
        If Jinja is not installed, without which there is no ``what``.
    """
    try:
        import jinja2
    except ImportError:
        raise MissingExtraError(what, "jinja2") from None
    loader = jinja2.FileSystemLoader(file.parent)
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(file.name)


def render_html(
    rows: Sequence[Row],
    settings: Mapping[str, Any],
    runs: Sequence[Run] = (),
    pictures: Sequence[Picture] = (),
    remarks: Sequence[str] = (),
) -> str:
    """One self-contained page; everything that came from data is escaped.

    Parameters
    ----------
    rows, settings, runs
        As in `write_reports`.
    pictures : sequence of Picture
        Regressions to show.
    remarks : sequence of str
        Sentences for beside them.
    """
    places = dict.fromkeys((row.model, row.task) for row in rows)
    return template("The report", Path(__file__).parent / "templates" / "report.html.j2").render(
        sections=[_section([row for row in rows if (row.model, row.task) == place]) for place in places],
        tasks=list(dict.fromkeys(row.task for row in rows)),
        plotly=plotly_script(),
        wins=(WINS, wins_table(rows), WINS_LEGEND),
        published=(BESIDE, beside_table(rows), PUBLISHED_LEGEND),
        pictures=pictures,
        remarks=remarks,
        legend=legend(rows),
        caveat=CAVEAT,
        settings=dump(dict(settings)),
        origins=origins(runs),
        data=data_of(runs),
        cells=[(run.id, run.name, run.task, dump(run.record.cell.model_dump())) for run in runs],
    )


def _section(rows: Sequence[Row]) -> dict[str, Any]:
    """What the page says about one model and task; every table is (title, columns, [(row, cells)])."""
    good = [row for row in rows if row.versus_unpruned]
    return {
        "model": rows[0].model,
        "task": rows[0].task,
        "documents": max(row.documents for row in rows),
        "plot": pareto_html(rows),
        "tables": [
            _table("", shown(rows), rows),
            _table("Answers that turned", FLIPS, good),
            _table("Accuracy by kind of question, %", kinds_columns(rows), [row for row in rows if row.kinds]),
        ],
        "remarks": [*failures(rows), *notes(rows)],
    }


def _table(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> tuple[str, Sequence[Column], list[Any]]:
    return title, columns, list(zip(rows, lines_of(columns, rows), strict=True))
