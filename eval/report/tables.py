# SPDX-License-Identifier: Apache-2.0
"""The report's tables besides the main one: kinds of questions, answers that turned, wins against random."""

from __future__ import annotations

from collections.abc import Sequence

from vtoken.eval.comparison.summary import Row
from vtoken.eval.report.columns import KEEP, REDUCER, Column
from vtoken.eval.report.formats import SIGNIFICANT, flips_text, p_text, share_text

FLIPS = (
    REDUCER,
    KEEP,
    Column("lost", "right to wrong", lambda row: share_text(row.versus_unpruned, "lost")),
    Column("won", "wrong to right", lambda row: share_text(row.versus_unpruned, "won")),
    Column("changed", "answer changed", lambda row: share_text(row.versus_unpruned, "changed")),
    Column("random_flips", "lost/won vs random", lambda row: flips_text(row.versus_random)),
    Column("random_p", "p vs random", lambda row: p_text(row.versus_random)),
)
"""How often a reducer turns an answer, against the unpruned model and against `random` at the same budget."""
WINS = ("reducer", "runs", "better", "worse", "no difference shown", "questions won", "questions lost")
WINS_LEGEND = "better, worse: runs whose difference is beyond chance after Holm's correction over their table."


def kinds_columns(rows: Sequence[Row]) -> list[Column]:
    """Accuracy by kind of question, in per cent; for rows of a task that has kinds."""
    return [REDUCER, KEEP, *map(_kind, dict.fromkeys(kind for row in rows for kind in row.kinds or {}))]


def _kind(kind: str) -> Column:
    return Column(kind, kind, lambda row: f"{100 * row.kinds[kind]:.0f}" if row.kinds and kind in row.kinds else "")


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
