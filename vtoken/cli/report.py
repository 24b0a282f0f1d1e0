# SPDX-License-Identifier: Apache-2.0
"""``vtoken report``: one self-contained HTML page about finished results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vtoken.cli.console import err, out, sentences

if TYPE_CHECKING:
    from vtoken.eval.comparison.regressions import Regression


def report_command(
    folder: Annotated[Path, typer.Argument(help="A results folder, or one that holds several.")],
    file: Annotated[Path | None, typer.Option("--out", help="The page; FOLDER/report.html by default.")] = None,
    pictures: Annotated[
        int, typer.Option(min=0, help="Worst regressions to draw; loads their models. 0 draws none.")
    ] = 4,
    by_seed: Annotated[bool, typer.Option("--by-seed", help="A row for every seed instead of one over all.")] = False,
) -> None:
    """Write a page with plots, tables, the worst regressions as pictures, and where the results come from."""
    with sentences():
        from transformers.utils.logging import disable_progress_bar

        from vtoken.eval.comparison.runs import read_runs
        from vtoken.eval.comparison.seeds import over_seeds
        from vtoken.eval.comparison.summary import rows_of
        from vtoken.eval.report.page import render_html, write_file
        from vtoken.eval.report.pictures import draw_regressions

        runs = read_runs(folder)
        disable_progress_bar()  # of loading weights
        drawn, remarks = draw_regressions(runs, pictures, _announce)
        rows = rows_of(runs if by_seed else over_seeds(runs))
        page = render_html(rows, _settings(folder), runs, drawn, remarks)
        written = write_file(file or folder / "report.html", page)
    for remark in remarks:
        err().print(remark, markup=False, highlight=False, soft_wrap=True)
    out().print(f"Written: {written}", highlight=False, markup=False, soft_wrap=True)


def _announce(regression: Regression) -> None:
    line = f"drawing {regression.run.name} on {regression.run.task}, document {regression.doc_id}"
    err().print(line, markup=False, highlight=False, soft_wrap=True)


def _settings(folder: Path) -> dict[str, Any]:
    """What the command that made the results was told, where it says so."""
    from vtoken.eval.comparison.runs import TABLE
    from vtoken.eval.store.files import read_json

    found = (read_json(folder / TABLE) or {}).get("settings")
    return found if isinstance(found, dict) else {}
