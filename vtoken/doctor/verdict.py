# SPDX-License-Identifier: Apache-2.0
"""The sentence at the end of a report, and its exit code."""

from __future__ import annotations

from collections import Counter

from vtoken.doctor.report import Report
from vtoken.profile.spread import Ratio

GOOD, FAULT, COULD_NOT = 0, 1, 2
WORTH = 1.05
"""A speed-up below which nothing was gained that could be told from the spread of the runs."""


def judge(report: Report) -> None:
    """Set the verdict and the exit code of a report whose checks are done."""
    subject = report.found.model_class if report.found else report.model
    if faults := report.faults:
        first = next((check for check in report.checks if check.status == "failed"), None)
        why = first.detail if first is not None else next(r.detail for r in report.reducers if r.status == "failed")
        others = f" ({len(faults) - 1} further checks failed too)" if len(faults) > 1 else ""
        report.exit_code = FAULT
        report.verdict = f"Fault found on {subject}: {faults[0]}: {why}{others}; please report it with the JSON."
        return
    counts: Counter[str] = Counter(check.status for check in report.checks)
    asked = sum(counts[status] for status in ("passed", "unproven"))
    if not counts["passed"]:
        report.verdict = f"Nothing could be shown on {subject}: {_first_reason(report)}"
        return
    parts = [f"{counts['passed']} of {asked} checks passed"]
    for status, words in (("unproven", "showed nothing"), ("refused", "not offered"), ("skipped", "not tried")):
        if counts[status]:
            parts.append(f"{counts[status]} {words}")
    parts += _reducers(report)
    parts += _gain(report)
    report.exit_code = GOOD
    report.verdict = f"vtoken works on {subject}: {', '.join(parts)}."


def _first_reason(report: Report) -> str:
    return next((f"{check.name}: {check.detail}" for check in report.checks), "no check was run.")


def _reducers(report: Report) -> list[str]:
    counts = Counter(row.status for row in report.reducers)
    if not report.reducers:
        return []
    parts = [f"{counts['passed']} of {len(report.reducers)} reducers work"]
    if counts["refused"]:
        parts.append(f"{counts['refused']} refuse with a reason")
    if counts["skipped"]:
        parts.append(f"{counts['skipped']} were not tried")
    return parts


def _gain(report: Report) -> list[str]:
    """Whether this prompt gains anything here."""
    if (cost := report.cost) is None:
        return []
    low, high = cost.prefill_quartiles
    if Ratio(cost.prefill_speedup, low, high).noisy:
        return [f"timing too noisy to tell what {cost.reducer} gains ({low:.2g} to {high:.2g} times as fast)"]
    gains = f"{cost.reducer} makes the prefill of this prompt {cost.prefill_speedup:.2f} times as fast"
    if cost.prefill_speedup > WORTH:
        return [gains]
    if cost.break_even is None:
        return [f"{gains}, which is no gain"]
    return [f"{gains}, which is no gain: from about {cost.break_even:.0f} visual tokens on it pays"]
