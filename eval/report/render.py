# SPDX-License-Identifier: Apache-2.0
"""How rows read: the same columns for the terminal, the report and the README."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

Columns = dict[str, Callable[[Row], str]]
TEXT = ("source", "model", "task", "reducer", "against")
"""Columns of names; all others hold numbers."""

COLUMNS: Columns = {
    "reducer": lambda row: row.reducer,
    "keep": lambda row: "" if row.keep is None else f"{row.keep:g}",
    "accuracy % [95 % CI]": accuracy_text,
    "vs unpruned": lambda row: difference_text(row.versus_unpruned),
    "p": lambda row: p_text(row.versus_unpruned),
    "retained": lambda row: "" if row.retained is None else f"{100 * row.retained:.1f} %{interval_text(row)}",
    "vs random": lambda row: difference_text(row.versus_random),
    "tokens": tokens_text,
    "prefill ms": lambda row: "" if row.prefill_ms is None else f"{row.prefill_ms:.1f}",
    "speed-up": speedup_text,
    "KV": lambda row: "" if row.kv_bytes is None else bytes_text(row.kv_bytes),
}
NARROW: Columns = {
    "reducer": COLUMNS["reducer"],
    "keep": COLUMNS["keep"],
    "accuracy": plus_minus_text,
    "diff": COLUMNS["vs unpruned"],
    "rnd": COLUMNS["vs random"],
    "of all": lambda row: "" if row.retained is None else f"{100 * row.retained:.1f}",
    "tokens": lambda row: tokens_text(row).split(" ")[0],
    "ms": COLUMNS["prefill ms"],
    "speed": lambda row: speedup_text(row).split(" ")[0],
    "KV": lambda row: COLUMNS["KV"](row).removesuffix("iB").replace(" ", ""),
}
"""The same for a terminal of 80 characters."""
REFERENCE: Columns = {
    "reducer": COLUMNS["reducer"],
    "keep": COLUMNS["keep"],
    "accuracy % [95 % CI]": COLUMNS["accuracy % [95 % CI]"],
    "against": lambda row: row.reference,
    "difference": lambda row: difference_text(row.versus_reference),
    "p": lambda row: p_text(row.versus_reference),
    "lost/won": lambda row: flips_text(row.versus_reference),
    "changed": lambda row: changed_text(row.versus_reference),
    "tokens": COLUMNS["tokens"],
    "prefill ms": COLUMNS["prefill ms"],
    "KV": COLUMNS["KV"],
}
"""Where results of one folder are compared with those of another."""
REFERENCE_NARROW: Columns = {
    "reducer": COLUMNS["reducer"],
    "keep": COLUMNS["keep"],
    "accuracy": NARROW["accuracy"],
    "diff": REFERENCE["difference"],
    "p": REFERENCE["p"],
    "lost/won": REFERENCE["lost/won"],
    "tokens": NARROW["tokens"],
}
LEGEND = (
    "vs unpruned (diff), vs random (rnd, at the same keep): paired difference in points; * is p < 0.05 and p is that "
    "vs unpruned, both after Holm's correction over the rows of a model and task (exact McNemar test; sign flips by "
    "picture where several questions on one changed). retained (of all): % of the unpruned accuracy. tokens: visual "
    "tokens that enter the language model, mean per question; in brackets the mean over its layers, where a method "
    "drops more inside. evidence: share of the tokens on what the question is about that were kept, mean over layers. "
    "prefill: {batch} prompts at once, without the vision tower, measured apart, medians of "
    "alternating runs; noisy: the quartiles of the runs' ratios are far apart, or on both sides of 1. "
    "KV: cache per prompt after the prefill. Intervals resample pictures."
)
REFERENCE_LEGEND = (
    "difference (diff): paired, in points; * is p < 0.05, after Holm's correction over the rows of a model and task "
    "(exact McNemar test; sign flips by picture where several questions on one changed). lost/won: questions that "
    "only the reference, only this run got right. changed: answers that read differently. tokens: visual tokens that "
    "enter the language model."
)


def layouts(rows: Sequence[Row]) -> tuple[Columns, Columns]:
    """The columns for these rows: all of them, and those for 80 characters."""
    if any(row.reference for row in rows):
        return REFERENCE, REFERENCE_NARROW
    extra: Columns = {}
    if any(row.evidence_recall is not None for row in rows):
        extra["evidence"] = lambda row: "" if row.evidence_recall is None else f"{100 * row.evidence_recall:.0f} %"
    if any(published_text(row) for row in rows):
        extra["published"] = published_text
    return {**COLUMNS, **extra}, NARROW


def legend(rows: Sequence[Row]) -> str:
    """What the columns of `layouts` mean; has a field ``batch``."""
    return REFERENCE_LEGEND if any(row.reference for row in rows) else LEGEND


def cells_of(row: Row) -> list[str]:
    """The formatted columns of a row."""
    return [column(row) for column in COLUMNS.values()]


def failures(rows: Sequence[Row]) -> list[str]:
    """One line for each row that failed."""
    lines = []
    for row in rows:
        if row.error:
            name = f"{row.reducer} {COLUMNS['keep'](row)}".strip()
            lines.append(f"{name} on {row.task} failed: {row.error.strip().splitlines()[0]}")
    return lines


def notes(rows: Sequence[Row]) -> list[str]:
    """What limits a comparison: runs that were not asked the same questions, and runs without a reference."""
    lines = []
    compared = any(row.reference for row in rows)
    for row in rows:
        name = f"{row.source} {row.reducer} {COLUMNS['keep'](row)}".strip() + f" on {row.task}"
        for versus in (row.versus_unpruned, row.versus_random, row.versus_reference):
            if versus is not None and versus.documents < row.documents:
                lines.append(f"{name} is compared on {versus.documents} of its {row.documents} questions.")
        if compared and row.reference and row.versus_reference is None:
            lines.append(f"{name} has no question in common with {row.reference}.")
    return list(dict.fromkeys(lines))


def place_columns(rows: Sequence[Row]) -> list[str]:
    """``source``, ``model``, ``task`` and ``seed``, where rows differ in them."""
    return [name for name in ("source", "model", "task", "seed") if len({getattr(row, name) for row in rows}) > 1]
