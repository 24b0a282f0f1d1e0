# SPDX-License-Identifier: Apache-2.0
"""What is said below a table: cells that failed, and what limits a comparison."""

from __future__ import annotations

from collections.abc import Sequence

from vtoken.eval.comparison.summary import Row
from vtoken.eval.report.columns import KEEP, compared


def failures(rows: Sequence[Row]) -> list[str]:
    """One line for each row that failed."""
    lines = []
    for row in rows:
        if row.error:
            name = f"{row.reducer} {KEEP.text(row)}".strip()
            lines.append(f"{name} on {row.task} failed: {row.error.strip().splitlines()[0]}")
    return lines


def notes(rows: Sequence[Row]) -> list[str]:
    """What limits a comparison: runs that were not asked the same questions, and runs without a reference."""
    lines = []
    for row in rows:
        name = f"{row.source} {row.reducer} {KEEP.text(row)}".strip() + f" on {row.task}"
        for versus in (row.versus_unpruned, row.versus_random, row.versus_reference):
            if versus is not None and versus.documents < row.documents:
                lines.append(f"{name} is compared on {versus.documents} of its {row.documents} questions.")
        if compared(rows) and row.reference and row.versus_reference is None:
            lines.append(f"{name} has no question in common with {row.reference}.")
    return list(dict.fromkeys(lines))
