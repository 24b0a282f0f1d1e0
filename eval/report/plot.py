# SPDX-License-Identifier: Apache-2.0
"""Accuracy against tokens, prefill time and KV memory, as interactive HTML that needs no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple

from vtoken.eval.comparison.summary import Row
from vtoken.eval.errors import MissingExtraError
from vtoken.eval.store.record import UNPRUNED


class Axis(NamedTuple):
    """What accuracy is drawn against."""

    button: str
    title: str
    value: Callable[[Row], float | None]


AXES = (
    Axis("tokens", "visual tokens per decoder layer", lambda row: row.visual_per_layer),
    Axis("prefill time", "measured prefill, ms", lambda row: row.prefill_ms),
    Axis("KV memory", "KV cache per prompt, MiB", lambda row: row.kv_bytes and row.kv_bytes / 2**20),
)


def plotly_script() -> str:
    """The library that draws the figures of `pareto_html`; a page needs it once.

    Raises
    ------
    MissingExtraError
        If plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise MissingExtraError("The report", "plotly") from None
    return str(get_plotlyjs())


def pareto_html(rows: Sequence[Row]) -> str:
    """One line per reducer, with error bars; the unpruned accuracy as a level; the Pareto front in grey.

    Parameters
    ----------
    rows : sequence of Row
        Of one model and task.

    Returns
    -------
    str
        A figure with a button for each of `AXES`, "" if no row has anything to draw.
    """
    import plotly.graph_objects as go

    figure, owners = go.Figure(), []
    drawn = [axis for axis in AXES if any(axis.value(row) for row in rows if row.accuracy and row.reducer != UNPRUNED)]
    for axis in drawn:
        traces = _traces([row for row in rows if row.accuracy and axis.value(row)], axis)
        figure.add_traces([go.Scatter(**trace, visible=axis is drawn[0]) for trace in traces])
        owners += [axis] * len(traces)
    if not drawn:
        return ""
    for row in rows:
        if row.reducer == UNPRUNED and row.accuracy:
            figure.add_hline(y=100 * row.accuracy.value, line_dash="dot", line_color="#888")
    buttons = [
        {
            "label": axis.button,
            "method": "update",
            "args": [
                {"visible": [owner is axis for owner in owners]},
                {"xaxis.title.text": f"{axis.title} (log scale)"},
            ],
        }
        for axis in drawn
    ]
    figure.update_layout(
        xaxis={"title": f"{drawn[0].title} (log scale)", "type": "log", "dtick": math.log10(2), "tickformat": ".3~g"},
        yaxis={"title": "accuracy, %"},
        template="plotly_white",
        height=520,
        margin={"l": 60, "r": 20, "t": 50, "b": 60},
        hovermode="closest",
        updatemenus=[
            {"type": "buttons", "direction": "right", "x": 0, "xanchor": "left", "y": 1.11, "buttons": buttons}
        ],
    )
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False}))


def pareto_front(rows: Sequence[Row], axis: Axis = AXES[0]) -> list[Row]:
    """Rows that no other row beats at no more cost, by cost."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (axis.value(row) or 0, -(row.accuracy.value if row.accuracy else 0))):
        if row.accuracy and (not front or row.accuracy.value > front[-1].accuracy.value):  # type: ignore[union-attr]
            front.append(row)
    return front


def _traces(rows: Sequence[Row], axis: Axis) -> list[dict[str, Any]]:
    """The front, a line per reducer and the unpruned point."""
    import plotly.colors

    colors = plotly.colors.qualitative.Dark24
    traces = [_front(rows, axis)]
    for number, reducer in enumerate(dict.fromkeys(row.reducer for row in rows if row.reducer != UNPRUNED)):
        points = sorted((row for row in rows if row.reducer == reducer), key=lambda row: axis.value(row) or 0)
        traces.append({**_trace(reducer, points, axis), "line": {"color": colors[number % len(colors)]}})
    whole = [row for row in rows if row.reducer == UNPRUNED]
    return [*traces, {**_trace(UNPRUNED, whole, axis), "marker": {"symbol": "star", "size": 12, "color": "#333"}}]


def _front(rows: Sequence[Row], axis: Axis) -> dict[str, Any]:
    front = pareto_front(rows, axis)
    return {
        "x": [axis.value(row) for row in front],
        "y": [100 * row.accuracy.value for row in front if row.accuracy],
        "name": "Pareto front",
        "mode": "lines",
        "line": {"color": "rgba(0, 0, 0, .12)", "width": 12},
        "hoverinfo": "skip",
    }


def _trace(name: str, rows: Sequence[Row], axis: Axis) -> dict[str, Any]:
    means = [row.accuracy for row in rows if row.accuracy]
    return {
        "name": escape(name),  # plotly renders a subset of HTML in names
        "x": [axis.value(row) for row in rows],
        "y": [100 * mean.value for mean in means],
        "error_y": {
            "array": [100 * (mean.high - mean.value) for mean in means],
            "arrayminus": [100 * (mean.value - mean.low) for mean in means],
            "thickness": 1,
            "width": 2,
        },
        "mode": "lines+markers",
        "text": [f"keep {row.keep:g}" if row.keep is not None else "all tokens" for row in rows],
        "hovertemplate": "%{text}: %{y:.1f} % at %{x:.1f}",
    }
