# SPDX-License-Identifier: Apache-2.0
"""The report's tables besides the main one: kinds of questions, answers that turned, wins against random."""

from __future__ import annotations

from collections.abc import Sequence

from vtoken.eval.comparison.summary import Row
from vtoken.eval.report.formats import SIGNIFICANT, flips_text, p_text, share_text
from vtoken.eval.report.render import COLUMNS, Columns

FLIPS: Columns = {
    "reducer": COLUMNS["reducer"],
    "keep": COLUMNS["keep"],
    "right to wrong": lambda row: share_text(row.versus_unpruned, "lost"),
    "wrong to right": lambda row: share_text(row.versus_unpruned, "won"),
    "answer changed": lambda row: share_text(row.versus_unpruned, "changed"),
    "lost/won vs random": lambda row: flips_text(row.versus_random),
    "p vs random": lambda row: p_text(row.versus_random),
}
"""How often a reducer turns an answer, against the unpruned model and against `random` at the same budget."""
WINS = ("reducer", "runs", "better", "worse", "no difference shown", "questions won", "questions lost")
WINS_LEGEND = "better, worse: runs whose difference is beyond chance after Holm's correction over their table."


def kinds_table(rows: Sequence[Row]) -> tuple[list[str], list[tuple[Row, list[str]]]]:
    """Columns and cells of the accuracy by kind of question; no rows where the task has no kinds."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.kinds or {}))
    lines = []
    for row in rows:
        if row.kinds:
            shares = [f"{100 * row.kinds[kind]:.0f}" if kind in row.kinds else "" for kind in kinds]
            lines.append((row, [row.reducer, COLUMNS["keep"](row), *shares]))
    return ["reducer", "keep", *kinds], lines


def wins_table(rows: Sequence[Row]) -> list[list[str]]:
    """Cells of `WINS`: every reducer against `random` at the same budget, over all models, tasks and budgets."""
    lines = []
    for reducer in dict.fromkeys(row.reducer for row in rows):
        found = [row.versus_random for row in rows if row.reducer == reducer and row.versus_random]
        if not found:
            continue
        clear = [versus for versus in found if (versus.adjusted or 0) < SIGNIFICANT]
        better = sum(versus.difference.value > 0 for versus in clear)
        sums = sum(versus.won for versus in found), sum(versus.lost for versus in found)
        counts = len(found), better, len(clear) - better, len(found) - len(clear), *sums
        lines.append([reducer, *map(str, counts)])
    return lines
