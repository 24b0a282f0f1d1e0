# SPDX-License-Identifier: Apache-2.0
"""How single values read: percent, points, p-values, tokens, bytes."""

from __future__ import annotations

from vtoken.eval.comparison.statistics import Paired
from vtoken.eval.comparison.summary import Row

SIGNIFICANT = 0.05


def accuracy_text(row: Row) -> str:
    """Percent with its interval."""
    if row.accuracy is None:
        return "failed"
    return f"{100 * row.accuracy.value:5.1f} [{100 * row.accuracy.low:.1f}, {100 * row.accuracy.high:.1f}]"


def plus_minus_text(row: Row) -> str:
    """Percent with half the width of its interval."""
    if row.accuracy is None:
        return "failed"
    return f"{100 * row.accuracy.value:5.1f} ±{50 * (row.accuracy.high - row.accuracy.low):.1f}"


def interval_text(row: Row) -> str:
    """The interval of what is retained."""
    found = row.versus_unpruned.retained if row.versus_unpruned else None
    return f" [{100 * found.low:.1f}, {100 * found.high:.1f}]" if found else ""


def difference_text(versus: Paired | None) -> str:
    """Points, with a star where they are beyond chance."""
    if versus is None:
        return ""
    star = versus.adjusted is not None and versus.adjusted < SIGNIFICANT
    return f"{100 * versus.difference.value:+.1f}" + "*" * star


def p_text(versus: Paired | None) -> str:
    """p-value, corrected where that was done."""
    if versus is None:
        return ""
    p = versus.p_value if versus.adjusted is None else versus.adjusted
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def flips_text(versus: Paired | None) -> str:
    """Questions lost and won."""
    return "" if versus is None else f"{versus.lost}/{versus.won}"


def changed_text(versus: Paired | None) -> str:
    """Answers that read differently."""
    return "" if versus is None or versus.changed is None else str(versus.changed)


def share_text(versus: Paired | None, name: str) -> str:
    """One of the counts of a comparison with its share of the questions."""
    if versus is None or not versus.documents or (count := getattr(versus, name)) is None:
        return ""
    return f"{count} ({100 * count / versus.documents:.1f} %)"


def tokens_text(row: Row) -> str:
    """Tokens that enter, and in brackets the mean over the layers where that is less."""
    if row.visual_kept is None:
        return ""
    inside = row.visual_per_layer
    less = inside is not None and abs(inside - row.visual_kept) >= 0.05
    return f"{row.visual_kept:.1f}" + (f" ({inside:.1f})" if less else "")


def speedup_text(row: Row) -> str:
    """How many times as fast the prefill is; or that this is noise, with the quartiles of the rounds."""
    if row.speedup is None:
        return ""
    if row.speedup_low is None or row.speedup_high is None:  # measured before quartiles were kept
        return f"{row.speedup:.2f}x"
    from vtoken.profile.spread import Ratio  # its package imports torch

    return str(Ratio(row.speedup, row.speedup_low, row.speedup_high))


def bytes_text(number: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if number >= 100 or unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"
