# SPDX-License-Identifier: Apache-2.0
"""What a comparison leaves behind: ``report.html``, ``results.json`` and ``results.csv``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vtoken.eval.cost import BATCH
from vtoken.eval.errors import EvalError, MissingExtraError
from vtoken.eval.plot import pareto_html
from vtoken.eval.provenance import surroundings
from vtoken.eval.render import COLUMNS, LEGEND, cells_of, failures
from vtoken.eval.store import dump, write_atomic
from vtoken.eval.summary import Row, as_csv

CAVEAT = (
    "The embedded models exist to compare reducers and to test them: they see an artificial picture world, and their "
    "numbers do not predict those of a 7B model."
)


def write_reports(rows: Sequence[Row], folder: Path, settings: dict[str, Any]) -> list[Path]:
    """Write the three files.

    Parameters
    ----------
    rows : sequence of Row
        All rows of the comparison.
    folder : Path
        Where to.
    settings : dict
        How it was run, for the record: limit, seed, batch size and the like.

    Raises
    ------
    EvalError
        If a file cannot be written.
    """
    data = {"settings": settings, "rows": [asdict(row) for row in rows], "made_with": surroundings()}
    contents = {
        "report.html": render_html(rows, settings),
        "results.json": dump(data),
        "results.csv": as_csv(rows),
    }
    for name, text in contents.items():
        try:
            write_atomic(folder / name, text)
        except OSError as error:
            raise EvalError(f"The file {str(folder / name)!r} cannot be written: {error.strerror}.") from None
    return [folder / name for name in contents]


def render_html(rows: Sequence[Row], settings: dict[str, Any]) -> str:
    """One self-contained page; everything that came from data is escaped."""
    try:
        import jinja2
    except ImportError:
        raise MissingExtraError("The report", "jinja2") from None
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    sections: list[dict[str, Any]] = []
    for model, task in dict.fromkeys((row.model, row.task) for row in rows):
        chosen = [row for row in rows if (row.model, row.task) == (model, task)]
        sections.append(
            {
                "model": model,
                "task": task,
                "documents": max(row.documents for row in chosen),
                "plot": pareto_html(chosen, script=not sections),
                "table": [cells_of(row) for row in chosen],
                "kinds": list(next((row.kinds for row in chosen if row.kinds), {}) or {}),
                "rows": chosen,
                "failures": failures(chosen),
            }
        )
    return environment.get_template("report.html.j2").render(
        sections=sections,
        columns=list(COLUMNS),
        legend=LEGEND.format(batch=BATCH),
        caveat=CAVEAT,
        settings=settings,
        made_with=surroundings(),
    )
