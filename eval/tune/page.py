# SPDX-License-Identifier: Apache-2.0
"""What tuning leaves behind: the preset, a page with the plot, and all numbers as JSON."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from vtoken.eval.report.page import template, write_file
from vtoken.eval.report.plot import plotly_script
from vtoken.eval.tune.costs import OBJECTIVES
from vtoken.eval.tune.outcome import COLUMNS, as_data, legend, preset, retained_text, sentences, table
from vtoken.eval.tune.race import Standing
from vtoken.eval.tune.tuning import Tuned

PAGE, DATA = "tune.html", "tune.json"


def write(tuned: Tuned, folder: Path, file: Path) -> list[Path]:
    """Write page and numbers into a folder, and the preset, if there is a choice, to a file.

    Raises
    ------
    EvalError
        If a file cannot be written.
    """
    contents = {folder / PAGE: render(tuned), folder / DATA: json.dumps(as_data(tuned), indent=1) + "\n"}
    if tuned.best is not None:
        contents = {file: preset(tuned, tuned.best), **contents}
    return [write_file(path, text) for path, text in contents.items()]


def render(tuned: Tuned) -> str:
    """One self-contained page."""
    return template("The page", Path(__file__).parent / "templates" / "tune.html.j2").render(
        title=f"vtoken tune: {tuned.model}",
        sentences=sentences(tuned),
        plotly=plotly_script(),
        plot=plot(tuned),
        columns=list(COLUMNS),
        rows=table(tuned),
        legend=legend(tuned),
    )


def plot(tuned: Tuned) -> str:
    """Retained accuracy against cost: a line per reducer, bounds, the target as a level, the choice as a star."""
    import plotly.colors
    import plotly.graph_objects as go

    figure, colors = go.Figure(), plotly.colors.qualitative.Dark24
    asked = [standing for standing in tuned.race.standings if standing.retained is not None]
    for number, reducer in enumerate(dict.fromkeys(standing.setting.reducer for standing in asked)):
        line = [standing for standing in asked if standing.setting.reducer == reducer]
        figure.add_scatter(**_trace(tuned, reducer, line), line_color=colors[number % len(colors)])
    if tuned.best is not None:
        star = {"symbol": "star", "size": 16, "color": "#333"}
        figure.add_scatter(
            **{**_trace(tuned, "the choice", [tuned.best]), "error_y": None, "mode": "markers", "marker": star}
        )
    target = f"target {100 * tuned.race.retain:g} %"
    figure.add_hline(y=100 * tuned.race.retain, line_dash="dot", line_color="#888", annotation_text=target)
    figure.update_layout(
        xaxis={"title": f"{OBJECTIVES[tuned.objective]}, % of unpruned"},
        yaxis={"title": "retained accuracy, %"},
        template="plotly_white",
        height=520,
        margin={"l": 60, "r": 20, "t": 30, "b": 60},
        hovermode="closest",
    )
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False}))


def _trace(tuned: Tuned, name: str, standings: list[Standing]) -> dict[str, Any]:
    shares = [100 * (standing.retained or 0.0) for standing in standings]
    ends = [tuned.race.bounds(standing) for standing in standings]
    return {
        "name": escape(name),  # plotly renders a subset of HTML in names
        "x": [100 * standing.setting.cost for standing in standings],
        "y": shares,
        "error_y": {
            "array": [min(100 * end.high, 2 * share) - share for end, share in zip(ends, shares, strict=True)],
            "arrayminus": [share - 100 * end.low for end, share in zip(ends, shares, strict=True)],
            "thickness": 1,
            "width": 2,
        },
        "mode": "lines+markers",
        "text": [escape(f"{s.setting.name}: {retained_text(tuned, s)}, {s.verdict.value}") for s in standings],
        "hovertemplate": "%{text}<extra></extra>",
    }
