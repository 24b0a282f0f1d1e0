# SPDX-License-Identifier: Apache-2.0
"""How rows read: the same columns for the terminal, the report and the README."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vtoken.eval.summary import Row

COLUMNS: dict[str, Callable[[Row], str]] = {
    "reducer": lambda row: row.reducer,
    "keep": lambda row: "" if row.keep is None else f"{row.keep:g}",
    "accuracy % [95 % CI]": lambda row: _accuracy(row),
    "vs unpruned": lambda row: f"{100 * row.versus_unpruned.difference.value:+.1f}" if row.versus_unpruned else "",
    "p": lambda row: _p_value(row),
    "retained": lambda row: "" if row.retained is None else f"{100 * row.retained:.1f} %",
    "tokens": lambda row: _tokens(row),
    "prefill ms": lambda row: "" if row.prefill_ms is None else f"{row.prefill_ms:.1f}",
    "speed-up": lambda row: "" if row.speedup is None else f"{row.speedup:.2f}x",
    "KV": lambda row: "" if row.kv_bytes is None else bytes_text(row.kv_bytes),
}
NARROW: dict[str, Callable[[Row], str]] = {
    "reducer": COLUMNS["reducer"],
    "keep": COLUMNS["keep"],
    "accuracy": lambda row: _plus_minus(row),
    "diff": COLUMNS["vs unpruned"],
    "p": COLUMNS["p"],
    "of all": lambda row: COLUMNS["retained"](row).removesuffix(" %"),
    "tokens": lambda row: _tokens(row).split(" ")[0],
    "ms": COLUMNS["prefill ms"],
    "speed": lambda row: "" if row.speedup is None else f"{row.speedup:.1f}x",
    "KV": lambda row: COLUMNS["KV"](row).removesuffix("iB").replace(" ", ""),
}
"""The same for a terminal of 80 characters."""
LEGEND = (
    "vs unpruned (diff): paired difference in points, exact McNemar p-value. retained (of all): % of the unpruned "
    "accuracy. tokens: visual tokens that enter the language model, mean per question; in brackets the mean over its "
    "layers, where a method drops more inside. prefill: {batch} prompts at once, without the vision tower, measured "
    "apart, medians of alternating runs. KV: cache per prompt after the prefill."
)


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


def place_columns(rows: Sequence[Row]) -> list[str]:
    """``model`` and ``task``, where rows differ in them."""
    return [name for name in ("model", "task") if len({getattr(row, name) for row in rows}) > 1]


def _accuracy(row: Row) -> str:
    if row.accuracy is None:
        return "failed"
    return f"{100 * row.accuracy.value:5.1f} [{100 * row.accuracy.low:.1f}, {100 * row.accuracy.high:.1f}]"


def _plus_minus(row: Row) -> str:
    if row.accuracy is None:
        return "failed"
    return f"{100 * row.accuracy.value:5.1f} ±{50 * (row.accuracy.high - row.accuracy.low):.1f}"


def _p_value(row: Row) -> str:
    if row.versus_unpruned is None:
        return ""
    p = row.versus_unpruned.p_value
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _tokens(row: Row) -> str:
    if row.visual_kept is None:
        return ""
    inside = row.visual_per_layer
    less = inside is not None and abs(inside - row.visual_kept) >= 0.05
    return f"{row.visual_kept:.1f}" + (f" ({inside:.1f})" if less else "")


def bytes_text(number: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if number >= 100 or unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"
