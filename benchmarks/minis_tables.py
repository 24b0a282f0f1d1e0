# SPDX-License-Identifier: Apache-2.0
"""The tables on all embedded models, from benchmarks/results/minis.json, and from mini_MODEL.json for what they can do.

- ``again``: weights of a second training beside the shipped ones (``mini_llava.py``, ``mini_models.py --weights``);
- ``embedded``: unpruned and blind accuracy of the models that know all tasks (``mini_models.py``);
- ``minis/MODEL``: pooled accuracy of every reducer at every keep ratio; a star marks a difference from `random`;
- ``minis/spread``: by model and task at keep 0.1, the best reducer and `random`;
- ``minis/claims``: later methods against earlier ones;
- ``minis/answers``: answers of one word and those that are written token by token;
- ``minis/agreement``: how alike two models rank the reducers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy.stats import spearmanr
from tabular import markdown
from weights import AGAIN

from vtoken.eval.comparison.runs import RANDOM
from vtoken.eval.store.record import UNPRUNED

SIGNIFICANT = 0.05
SPREAD_KEEP = 0.1
LONG_ANSWERS = ("mini_read", "mini_describe")
INSIDE = 1.2  # tokens over all layers, relative to the budget, from which on a row is given more than its keep ratio

Row = dict[str, Any]


def embedded(results: Path) -> str:
    """What the models can do with all visual tokens, and without any, in percent."""
    paths = [path for path in sorted(results.glob("mini_*.json")) if not path.stem.endswith(AGAIN)]
    reports = [json.loads(path.read_text()) for path in paths]
    reports = [found for found in reports if "exist" in found["conditions"]["blind"]["by_kind"]]
    kinds = list(dict.fromkeys(kind for report in reports for kind in report["conditions"]["unpruned"]["by_kind"]))
    lines = [
        [
            f"`{report['model']}`",
            condition,
            f"**{100 * found['mean']:.1f}**",
            *(f"{100 * found['by_kind'][kind]:.0f}" if kind in found["by_kind"] else "" for kind in kinds),
        ]
        for report in reports
        for condition, found in report["conditions"].items()
    ]
    return markdown(["", "", "all", *kinds], lines, text_columns=2)


def again(results: Path) -> str:
    """Models that were trained again by their one command, beside the shipped ones, in percent."""
    lines = []
    for path in sorted(results.glob(f"mini_*{AGAIN}.json")):
        shipped = path.with_name(path.name.replace(AGAIN, ""))
        for which, report in (("shipped", json.loads(shipped.read_text())), ("again", json.loads(path.read_text()))):
            times = report.get("training_minutes", {})
            minutes = f"{sum(phase['processor'] for phase in times.values()):.0f}" if times else ""
            for condition, found in report["conditions"].items():
                mean = found.get("mean", found.get("accuracy"))
                kinds = ", ".join(f"{kind} {100 * value:.0f}" for kind, value in found["by_kind"].items())
                lines.append([f"`{report['model']}`", condition, which, minutes, f"**{100 * mean:.1f}**", kinds])
    lines.sort(key=lambda line: line[0])
    return markdown(["model", "", "weights", "processor minutes", "all", "by kind"], lines, text_columns=3)


def keeps(rows: Sequence[Row]) -> list[float]:
    """The keep ratios, large ones first."""
    return sorted({row["keep"] for row in rows if row["keep"] is not None}, reverse=True)


def cell(row: Row | None) -> str:
    """Accuracy, and whether it differs from that of random tokens."""
    if row is None:
        return ""
    text = f"{100 * row['accuracy']['value']:.1f}"
    versus = row.get("versus_random")
    if versus is None or versus["adjusted"] >= SIGNIFICANT:
        return text
    return f"{text} {'+' if versus['value'] > 0 else MINUS}"


MINUS = "\N{MINUS SIGN}"


def matrix(rows: Sequence[Row], model: str) -> str:
    """One model: reducers by their mean accuracy over the keep ratios, then those without a ratio."""
    mine = [row for row in rows if row["model"] == model]
    ratios = keeps(mine)
    table: dict[str, dict[Any, Row]] = {}
    for row in mine:
        table.setdefault(row["reducer"], {})[row["keep"]] = row
    budgeted = [name for name, found in table.items() if None not in found]
    order = sorted(budgeted, key=lambda name: -sum(found["accuracy"]["value"] for found in table[name].values()))
    lines = []
    for name in order:
        tenth = table[name].get(SPREAD_KEEP)
        evidence = (
            "" if tenth is None or tenth["evidence_recall"] is None else f"{100 * tenth['evidence_recall']:.0f} %"
        )
        tokens = "" if tenth is None else f"{100 * tenth['visual_per_layer'] / tenth['visual_tokens']:.0f} %"
        lines.append([f"`{name}`", *(cell(table[name].get(keep)) for keep in ratios), evidence, tokens])
    head = ["reducer", *(f"keep {keep:g}" for keep in ratios), "evidence at 0.1", "tokens at 0.1"]
    count = max(row["documents"] for row in mine)
    return f"{markdown(head, lines)}\n{unbudgeted(table)}\n{count} documents a row."


def unbudgeted(table: Mapping[str, Mapping[Any, Row]]) -> str:
    """The rows without a keep ratio."""
    found = sorted((rows[None] for rows in table.values() if None in rows), key=lambda row: -row["accuracy"]["value"])
    lines = [
        [
            f"`{row['reducer']}`",
            f"{100 * row['accuracy']['value']:.1f}",
            f"{100 * row['visual_per_layer'] / row['visual_tokens']:.0f} %",
        ]
        for row in found
    ]
    return markdown(["without a keep ratio", "accuracy", "tokens"], lines)


def spread(rows: Sequence[Row]) -> str:
    """What separates methods, by model and task."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model and row["keep"] == SPREAD_KEEP]
        whole = next(row for row in rows if row["model"] == model and row["reducer"] == UNPRUNED)
        control = next(row for row in mine if row["reducer"] == RANDOM)
        before = [row for row in mine if row["visual_per_layer"] <= INSIDE * control["visual_per_layer"]]
        for task, score in whole["tasks"].items():
            best = max((row for row in before if task in row["tasks"]), key=lambda row: row["tasks"][task])
            values = [score, best["tasks"][task], control["tasks"][task]]
            gap = 100 * (values[1] - values[2])
            shown = (f"{100 * value:.1f}" for value in values)
            lines.append([model, f"`{task}`", *shown, f"`{best['reducer']}`", f"{gap:+.1f}"])
    columns = ["model", "task", "unpruned", f"best at {SPREAD_KEEP:g}", "random", "which", "best - random"]
    return markdown(columns, lines, text_columns=2)


def agreement(rows: Sequence[Row]) -> str:
    """Rank correlation of the reducers' pooled accuracies between models, at each keep ratio."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    values = {(row["model"], row["reducer"], row["keep"]): row["accuracy"]["value"] for row in rows}
    lines = []
    for i, first in enumerate(models):
        for second in models[i + 1 :]:
            found = []
            for keep in keeps(rows):
                names = [n for m, n, k in values if m == first and k == keep and (second, n, keep) in values]
                pairs = [(values[first, n, keep], values[second, n, keep]) for n in names]
                found.append(f"{spearmanr(*zip(*pairs, strict=True)).statistic:.2f}")
            lines.append([f"{first}, {second}", *found])
    return markdown(["Spearman's rank correlation", *(f"keep {keep:g}" for keep in keeps(rows))], lines)


def claims(found: Sequence[Row]) -> str:
    """Difference in points between a later method and an earlier one; a star if it is no chance."""
    models = list(dict.fromkeys(claim["model"] for claim in found))
    columns = [(model, keep) for model in models for keep in dict.fromkeys(claim["keep"] for claim in found)]
    by_pair: dict[tuple[str, str], dict[Any, str]] = {}
    for claim in found:
        star = "*" if claim["adjusted"] < SIGNIFICANT else ""
        text = f"{100 * claim['value']:+.1f}{star}"
        by_pair.setdefault((claim["new"], claim["old"]), {})[claim["model"], claim["keep"]] = text
    lines = [
        [f"`{new}` over `{old}`", *(cells.get(column, "") for column in columns)]
        for (new, old), cells in by_pair.items()
    ]
    heads = [f"{model.removeprefix('mini-')} at {keep:g}" for model, keep in columns]
    return markdown(["points", *heads], lines)


def answers(rows: Sequence[Row]) -> str:
    """Accuracy where the answer is one word, and where it is written token by token, at two keep ratios."""
    found: dict[str, dict[Any, str]] = {}
    models = list(dict.fromkeys(row["model"] for row in rows if LONG_ANSWERS[0] in row["tasks"]))
    for row in rows:
        if row["model"] in models and row["keep"] in (None, 0.5, SPREAD_KEEP):
            parts = [
                [v for task, v in row["tasks"].items() if (task in LONG_ANSWERS) is long] for long in (False, True)
            ]
            if all(parts):
                text = " / ".join(f"{100 * fmean(part):.0f}" for part in parts)
                found.setdefault(row["reducer"], {})[row["model"], row["keep"]] = text
    columns = [(model, keep) for model in models for keep in (0.5, SPREAD_KEEP)]
    lines = [
        [f"`{name}`", *(cells.get((model, keep), cells.get((model, None), "")) for model, keep in columns)]
        for name, cells in sorted(found.items())
    ]
    heads = [f"{model.removeprefix('mini-')} at {keep:g}" for model, keep in columns]
    return markdown(["one word / written", *heads], lines)


PARTS: dict[str, Callable[[Sequence[Row]], str]] = {"spread": spread, "agreement": agreement, "answers": answers}


def minis(part: str, report: Mapping[str, Any]) -> str:
    """The generated text of one block."""
    if part == "claims":
        return claims(report["claims"])
    return PARTS[part](report["rows"]) if part in PARTS else matrix(report["rows"], part)
