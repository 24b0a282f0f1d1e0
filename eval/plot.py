# SPDX-License-Identifier: Apache-2.0
"""Accuracy against visual tokens, as interactive HTML that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from vtoken.eval.errors import MissingExtraError
from vtoken.eval.summary import Row


def pareto_html(rows: Sequence[Row], *, script: bool = True) -> str:
    """One line per reducer, with error bars; the unpruned accuracy as a level; the Pareto front in grey.

    Parameters
    ----------
    rows : sequence of Row
        Of one model and task.
    script : bool
        Whether plotly's script comes along; one figure of a page must bring it.
    """
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise MissingExtraError("The report", "plotly") from None
    good = [row for row in rows if row.accuracy is not None and row.visual_per_layer is not None]
    figure = go.Figure()
    front = pareto_front(good)
    figure.add_scatter(
        x=[row.visual_per_layer for row in front],
        y=[100 * row.accuracy.value for row in front if row.accuracy],
        name="Pareto front",
        mode="lines",
        line={"color": "rgba(0, 0, 0, .12)", "width": 12},
        hoverinfo="skip",
    )
    for reducer in dict.fromkeys(row.reducer for row in good if row.versus_unpruned):
        points = sorted((row for row in good if row.reducer == reducer), key=lambda row: row.visual_per_layer or 0)
        figure.add_scatter(**_trace(reducer, points))
    for row in good:
        if row.reducer == "unpruned" and row.accuracy:
            figure.add_scatter(**_trace("unpruned", [row]), marker_symbol="star", marker_size=11)
            figure.add_hline(y=100 * row.accuracy.value, line_dash="dot", line_color="#888")
    figure.update_layout(
        xaxis={"title": "visual tokens per decoder layer (log scale)", "type": "log"},
        yaxis={"title": "accuracy, %"},
        template="plotly_white",
        height=520,
        margin={"l": 60, "r": 20, "t": 20, "b": 60},
        hovermode="closest",
    )
    return figure.to_html(full_html=False, include_plotlyjs=script, config={"displaylogo": False})


def pareto_front(rows: Sequence[Row]) -> list[Row]:
    """Rows that no other row beats with at most as many tokens, by number of tokens."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.visual_per_layer or 0, -(row.accuracy.value if row.accuracy else 0))):
        if row.accuracy and (not front or row.accuracy.value > front[-1].accuracy.value):  # type: ignore[union-attr]
            front.append(row)
    return front


def _trace(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    means = [row.accuracy for row in rows if row.accuracy]
    return {
        "name": escape(name),  # plotly renders a subset of HTML in names
        "x": [row.visual_per_layer for row in rows],
        "y": [100 * mean.value for mean in means],
        "error_y": {
            "array": [100 * (mean.high - mean.value) for mean in means],
            "arrayminus": [100 * (mean.value - mean.low) for mean in means],
            "thickness": 1,
            "width": 2,
        },
        "mode": "lines+markers",
        "text": [f"keep {row.keep:g}" if row.keep is not None else "all tokens" for row in rows],
        "hovertemplate": "%{text}: %{y:.1f} % at %{x:.1f} tokens",
    }
