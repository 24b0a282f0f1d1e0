# SPDX-License-Identifier: Apache-2.0
"""The columns of a comparison, each in one place: terminal, CSV, JSON, Markdown, LaTeX, HTML and the docs follow.

A new column is one entry of `COLUMNS`, and a field of `vtoken.eval.comparison.summary.Row` if it holds something new.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vtoken.eval.comparison.summary import Row
from vtoken.eval.report.formats import (
    accuracy_text,
    bytes_text,
    changed_text,
    difference_text,
    flips_text,
    interval_text,
    p_text,
    plus_minus_text,
    speedup_text,
    tokens_text,
)
from vtoken.eval.report.published import published_text
from vtoken.eval.store.results import BATCH

Text = Callable[[Row], str]
When = Callable[[Sequence[Row]], bool]

_FIELDS = {found.name for found in dataclasses.fields(Row)}
_TEST = (
    "* is p < 0.05 after Holm's correction over the rows of a model and task (exact McNemar test; sign flips by "
    "picture where several questions on one changed)"
)


def always(rows: Sequence[Row]) -> bool:
    """For any rows."""
    return True


def never(rows: Sequence[Row]) -> bool:
    """In no table: for CSV and JSON alone."""
    return False


def compared(rows: Sequence[Row]) -> bool:
    """Where results of one folder are compared with those of another."""
    return any(row.reference for row in rows)


def alone(rows: Sequence[Row]) -> bool:
    """Where they are not."""
    return not compared(rows)


def _differs(name: str) -> When:
    return lambda rows: len({getattr(row, name) for row in rows}) > 1


def _known(name: str) -> When:
    return lambda rows: alone(rows) and any(getattr(row, name) is not None for row in rows)


@dataclass(frozen=True)
class Narrow:
    """A column on a terminal of 80 characters.

    Parameters
    ----------
    title : str
    text : callable, optional
        The column's own by default.
    when : callable
        As in `Column`, besides its own condition.
    """

    title: str
    text: Text | None = None
    when: When = always


@dataclass(frozen=True)
class Column:
    """One column.

    Parameters
    ----------
    key : str
        Its name in CSV and JSON, which hold the value of that field of `Row`; a key that is no field is shown only.
    title : str
        Its heading.
    text : callable
        A row's cell.
    narrow : Narrow, optional
        On a terminal of 80 characters; left out there by default.
    legend : str
        What it means, in sentences.
    when : callable
        Whether a table of these rows has it.
    is_name : bool
        Names from data stand on the left, may be wrapped and are escaped; numbers stand on the right.
    """

    key: str
    title: str
    text: Text
    narrow: Narrow | None = None
    legend: str = ""
    when: When = always
    is_name: bool = False


def _place(name: str) -> Column:
    return Column(name, name, lambda row: str(getattr(row, name)), Narrow(name), when=_differs(name), is_name=True)


def _value(name: str) -> Column:
    return Column(name, name, lambda row: str(getattr(row, name)), when=never)


REDUCER = Column("reducer", "reducer", lambda row: row.reducer, Narrow("reducer"), is_name=True)
KEEP = Column("keep", "keep", lambda row: "" if row.keep is None else f"{row.keep:g}", Narrow("keep"))

COLUMNS: tuple[Column, ...] = (
    _value("cell"),
    _place("source"),
    _place("model"),
    _place("task"),
    Column(
        "seed",
        "seed",
        lambda row: "" if row.seed is None else str(row.seed),
        Narrow("seed"),
        "seed: none where no seed can change the answers.",
        lambda rows: len({row.seed for row in rows if row.seed is not None}) > 1,
    ),
    REDUCER,
    KEEP,
    _value("documents"),
    Column(
        "left_out",
        "left out",
        lambda row: str(row.left_out or ""),
        Narrow("out"),
        "left out (out): documents that could not be read and are not counted (--skip-broken).",
        lambda rows: any(row.left_out for row in rows),
    ),
    Column("accuracy", "accuracy % [95 % CI]", accuracy_text, Narrow("accuracy", plus_minus_text)),
    _value("seeds"),
    Column(
        "seed_spread",
        "± seeds",
        lambda row: "" if row.seed_spread is None else f"{100 * row.seed_spread:.1f} ({row.seeds})",
        Narrow("±"),
        "± seeds (±): standard deviation of the accuracy over seeds, in points, of how many; the row is their mean.",
        lambda rows: any(row.seeds > 1 for row in rows),
    ),
    Column(
        "versus_unpruned",
        "vs unpruned",
        lambda row: difference_text(row.versus_unpruned),
        Narrow("diff"),
        f"vs unpruned (diff): paired difference in points; {_TEST}. p is that vs unpruned, corrected.",
        alone,
    ),
    Column("unpruned_p", "p", lambda row: p_text(row.versus_unpruned), when=alone),
    Column(
        "retained",
        "retained",
        lambda row: "" if row.retained is None else f"{100 * row.retained:.1f} %{interval_text(row)}",
        Narrow("of all", lambda row: "" if row.retained is None else f"{100 * row.retained:.1f}"),
        "retained (of all): % of the unpruned accuracy.",
        alone,
    ),
    Column(
        "versus_random",
        "vs random",
        lambda row: difference_text(row.versus_random),
        Narrow("rnd"),
        "vs random (rnd): likewise, against random at the same keep.",
        alone,
    ),
    Column("reference", "against", lambda row: row.reference, when=compared, is_name=True),
    Column(
        "versus_reference",
        "difference",
        lambda row: difference_text(row.versus_reference),
        Narrow("diff"),
        f"difference (diff): paired, in points; {_TEST}.",
        compared,
    ),
    Column("reference_p", "p", lambda row: p_text(row.versus_reference), Narrow("p"), when=compared),
    Column(
        "reference_flips",
        "lost/won",
        lambda row: flips_text(row.versus_reference),
        Narrow("lost/won"),
        "lost/won: questions that only the reference, only this run got right.",
        compared,
    ),
    Column(
        "reference_changed",
        "changed",
        lambda row: changed_text(row.versus_reference),
        legend="changed: answers that read differently.",
        when=compared,
    ),
    _value("visual_tokens"),
    Column(
        "visual_kept",
        "tokens",
        tokens_text,
        Narrow("tokens", lambda row: tokens_text(row).split(" ")[0]),
        "tokens: visual tokens that enter the language model, mean per question; in brackets the mean over its layers, "
        "where a method drops more inside.",
    ),
    _value("visual_per_layer"),
    _value("kinds"),
    Column(
        "prefill_ms",
        "prefill ms",
        lambda row: "" if row.prefill_ms is None else f"{row.prefill_ms:.1f}",
        Narrow("ms", when=alone),
        f"prefill (ms): {BATCH} prompts at once, without the vision tower, measured apart, medians of several runs.",
    ),
    Column(
        "speedup",
        "speed-up",
        speedup_text,
        Narrow("speed", lambda row: speedup_text(row).split(" ")[0]),
        "speed-up (speed): of the prefill, median over pairs of runs in turn; noisy: their quartiles are far apart, or "
        "on both sides of 1.",
        alone,
    ),
    _value("speedup_low"),
    _value("speedup_high"),
    Column(
        "kv_bytes",
        "KV",
        lambda row: "" if row.kv_bytes is None else bytes_text(row.kv_bytes),
        Narrow(
            "KV",
            lambda row: "" if row.kv_bytes is None else bytes_text(row.kv_bytes).removesuffix("iB").replace(" ", ""),
            alone,
        ),
        "KV: cache per prompt after the prefill.",
    ),
    Column(
        "evidence_recall",
        "evidence",
        lambda row: "" if row.evidence_recall is None else f"{100 * row.evidence_recall:.0f} %",
        legend="evidence: share of the tokens on what the question is about that were kept, mean over layers.",
        when=_known("evidence_recall"),
    ),
    Column("published", "published", published_text, when=lambda rows: alone(rows) and any(map(published_text, rows))),
    _value("error"),
)
"""In the order of all tables."""


def shown(rows: Sequence[Row], narrow: bool = False) -> list[Column]:
    """The columns of a table of these rows; with ``narrow`` those for 80 characters, with their titles and texts."""
    found = [column for column in COLUMNS if column.when(rows)]
    if not narrow:
        return found
    short = [(column, column.narrow) for column in found if column.narrow and column.narrow.when(rows)]
    return [dataclasses.replace(one, title=new.title, text=new.text or one.text) for one, new in short]


def exported() -> list[Column]:
    """The columns of CSV and JSON."""
    return [column for column in COLUMNS if column.key in _FIELDS]


def lines_of(columns: Sequence[Column], rows: Sequence[Row]) -> list[list[str]]:
    """The cells of a table."""
    return [[column.text(row) for column in columns] for row in rows]


def legend(rows: Sequence[Row]) -> str:
    """What the columns of `shown` mean."""
    return " ".join([*(column.legend for column in shown(rows) if column.legend), "Intervals resample pictures."])
