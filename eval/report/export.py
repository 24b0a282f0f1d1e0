# SPDX-License-Identifier: Apache-2.0
"""Rows as CSV with all values, and tables as Markdown and LaTeX with what came from data escaped."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Container, Sequence
from dataclasses import asdict
from typing import Any

from vtoken.eval.comparison.summary import VERSUS, Row

_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~#])")


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
    data = asdict(row)
    kinds, mean = data.pop("kinds") or {}, data.pop("accuracy")
    compared = {name.removeprefix("versus_"): data.pop(name) or {} for name in VERSUS}
    flat = {**data, **_estimate("accuracy", mean)}
    for name, versus in compared.items():
        for part in ("difference", "retained"):
            flat |= _estimate(f"{name}_{part}", versus.pop(part, None))
        flat |= {f"{name}_{key}": value for key, value in versus.items()}
    return {**flat, **{f"kind_{kind}": value for kind, value in kinds.items()}}


def _estimate(name: str, found: dict[str, float] | None) -> dict[str, float]:
    return {name if part == "value" else f"{name}_{part}": value for part, value in (found or {}).items()}


def as_markdown(columns: Sequence[str], lines: Sequence[Sequence[str]], text: Container[str]) -> str:
    """A Markdown table.

    Parameters
    ----------
    columns : sequence of str
        Headings.
    lines : sequence of sequence of str
        Formatted cells.
    text : container of str
        Columns that hold names, which are escaped; the others hold our numbers and are right-aligned.
    """
    marks = ["---" if name in text else "---:" for name in columns]
    names = [[_markdown(c) if name in text else c for name, c in zip(columns, line, strict=True)] for line in lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in (columns, marks, *names))


def _markdown(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def as_latex(columns: Sequence[str], lines: Sequence[Sequence[str]], text: Container[str]) -> str:
    """A LaTeX ``tabular`` with booktabs' rules; arguments as in `as_markdown`."""
    import pandas

    alignment = "".join("l" if name in text else "r" for name in columns)
    frame = pandas.DataFrame([[" ".join(cell.split()) for cell in line] for line in lines], columns=list(columns))
    return frame.to_latex(index=False, escape=True, column_format=alignment)
