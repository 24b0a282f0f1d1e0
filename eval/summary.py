# SPDX-License-Identifier: Apache-2.0
"""Finished cells as rows of one table, each against the unpruned cell of the same model and task."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from vtoken.eval.cells import Cell
from vtoken.eval.statistics import Estimate, Paired, accuracy, paired
from vtoken.eval.store import Store

MEANS = ("visual_tokens", "visual_kept", "visual_per_layer")
COSTS = ("prefill_ms", "speedup", "kv_bytes")


@dataclass(frozen=True)
class Row:
    """One cell, summarized.

    Parameters
    ----------
    retained : float or None
        Accuracy relative to the unpruned model's.
    visual_tokens, visual_kept, visual_per_layer : float
        Means over questions, see `vtoken.eval.counts.Visual`.
    kinds : dict
        Accuracy by kind of question, where the task has kinds.
    prefill_ms, speedup, kv_bytes : float or None
        Measured cost, see `vtoken.profile.measure_prefill`.
    error : str
        What the cell raised, "" if it finished.
    """

    cell: str
    model: str
    task: str
    reducer: str
    keep: float | int | None
    documents: int = 0
    accuracy: Estimate | None = None
    versus_unpruned: Paired | None = None
    retained: float | None = None
    visual_tokens: float | None = None
    visual_kept: float | None = None
    visual_per_layer: float | None = None
    kinds: dict[str, float] | None = None
    prefill_ms: float | None = None
    speedup: float | None = None
    kv_bytes: float | None = None
    error: str = ""


def summarize(cells: Sequence[Cell], store: Store) -> list[Row]:
    """One row per cell that was finished or failed, in the order of the cells."""
    samples = {cell.id: store.samples(cell.id) for cell in cells if store.result(cell.id) is not None}
    baselines = {_group(cell): samples[cell.id] for cell in cells if cell.reducer is None and cell.id in samples}
    rows = []
    for cell in cells:
        if cell.id in samples:
            rows.append(_row(cell, samples[cell.id], baselines.get(_group(cell)), store.profile(cell.id) or {}))
        elif failure := store.failure(cell.id):
            rows.append(Row(**_names(cell), error=failure["error"] or "unknown error"))
    return rows


def _group(cell: Cell) -> tuple:
    return cell.model, cell.task, cell.limit, cell.seed, cell.batch_size


def _names(cell: Cell) -> dict[str, Any]:
    return {
        "cell": cell.id,
        "model": cell.model.pretrained,
        "task": cell.task.name,
        "reducer": cell.label,
        "keep": cell.keep,
    }


def _row(cell: Cell, samples: list[dict], baseline: list[dict] | None, profile: dict[str, Any]) -> Row:
    scores, clusters = [s["score"] for s in samples], _clusters(samples)
    versus, retained = None, None
    if baseline is not None and cell.reducer is not None:
        if [s["doc_id"] for s in samples] != [s["doc_id"] for s in baseline]:
            raise ValueError(f"Cell {cell.id} and its unpruned cell answered different documents.")
        versus = paired(scores, [s["score"] for s in baseline], clusters)
    if baseline is not None and (whole := fmean(s["score"] for s in baseline)):
        retained = fmean(scores) / whole
    means: dict[str, Any] = {name: _mean(samples, name) for name in MEANS}
    costs: dict[str, Any] = {name: profile.get(name) for name in COSTS}
    return Row(
        **_names(cell),
        **means,
        **costs,
        documents=len(samples),
        accuracy=accuracy(scores, clusters),
        versus_unpruned=versus,
        retained=retained,
        kinds=_by_kind(samples),
    )


def _clusters(samples: list[dict]) -> list[str] | None:
    return [s["cluster"] for s in samples] if all(s["cluster"] for s in samples) else None


def _mean(samples: list[dict], name: str) -> float | None:
    values = [s["tokens"][name] for s in samples if name in s["tokens"]]
    return fmean(values) if values else None


def _by_kind(samples: list[dict]) -> dict[str, float] | None:
    kinds = list(dict.fromkeys(s["kind"] for s in samples if s["kind"]))
    return {kind: fmean(s["score"] for s in samples if s["kind"] == kind) for kind in kinds} or None


def row_from(data: Mapping[str, Any]) -> Row:
    """A row out of ``results.json``."""
    fields = dict(data)
    if mean := fields.get("accuracy"):
        fields["accuracy"] = Estimate(**mean)
    if versus := fields.get("versus_unpruned"):
        fields["versus_unpruned"] = Paired(**{**versus, "difference": Estimate(**versus["difference"])})
    return Row(**fields)


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
    kinds = data.pop("kinds") or {}
    mean, versus = data.pop("accuracy") or {}, data.pop("versus_unpruned") or {}
    difference = versus.pop("difference", {})
    return {
        **data,
        **{_join("accuracy", k): v for k, v in mean.items()},
        **{_join("difference", k): v for k, v in difference.items()},
        **versus,
        **{f"kind_{k}": v for k, v in kinds.items()},
    }


def _join(name: str, part: str) -> str:
    return name if part == "value" else f"{name}_{part}"
