# SPDX-License-Identifier: Apache-2.0
"""Rows as CSV with all values, and tables as Markdown and LaTeX with what came from data escaped."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vtoken.eval.comparison.statistics import Estimate
from vtoken.eval.comparison.summary import VERSUS, Row
from vtoken.eval.report.columns import exported

_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~#])")


def values_of(row: Row) -> dict[str, Any]:
    """What JSON holds of a row: the values of all columns, plain."""
    data = asdict(row)
    return {column.key: data[column.key] for column in exported()}


def as_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV; nested values become columns such as ``accuracy_low`` and ``kind_color``."""
    flat = [_flatten(row) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return file.getvalue()


def _flatten(row: Row) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values_of(row).items():
        found = getattr(row, name)
        if isinstance(found, Estimate):
            flat |= _estimate(name, value)
        elif name in VERSUS:
            flat |= _paired(name.removeprefix("versus_"), value or {})
        elif name == "kinds":
            flat |= {f"kind_{kind}": share for kind, share in (value or {}).items()}
        else:
            flat[name] = value
    return flat


def _paired(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for part, value in found.items():
        flat |= _estimate(f"{name}_{part}", value) if isinstance(value, dict) else {f"{name}_{part}": value}
    return flat


def _estimate(name: str, found: Mapping[str, float]) -> dict[str, float]:
    return {name if part == "value" else f"{name}_{part}": value for part, value in found.items()}


def as_markdown(titles: Sequence[str], lines: Sequence[Sequence[str]], names: Sequence[bool]) -> str:
    """A Markdown table.

    Parameters
    ----------
    titles : sequence of str
        Headings.
    lines : sequence of sequence of str
        Formatted cells.
    names : sequence of bool
        For each column whether it holds names, which are escaped; the others hold our numbers and are right-aligned.
    """
    marks = ["---" if is_name else "---:" for is_name in names]
    cells = [[_markdown(c) if is_name else c for c, is_name in zip(line, names, strict=True)] for line in lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in (titles, marks, *cells))


def _markdown(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def as_latex(titles: Sequence[str], lines: Sequence[Sequence[str]], names: Sequence[bool]) -> str:
    """A LaTeX ``tabular`` with booktabs' rules; arguments as in `as_markdown`."""
    import pandas

    alignment = "".join("l" if is_name else "r" for is_name in names)
    frame = pandas.DataFrame([[" ".join(cell.split()) for cell in line] for line in lines], columns=list(titles))
    return frame.to_latex(index=False, escape=True, column_format=alignment)
