# SPDX-License-Identifier: Apache-2.0
"""Runs as rows of a table: against the unpruned model, random at the same budget, and a run of another folder."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from vtoken.eval.comparison.runs import RANDOM, Group, Run, runs_of
from vtoken.eval.comparison.seeds import counterpart, over_seeds
from vtoken.eval.comparison.statistics import Estimate, Paired, accuracy, holm, paired
from vtoken.eval.store.record import UNPRUNED
from vtoken.eval.store.results import Store

if TYPE_CHECKING:
    from vtoken.eval.sweeps.cells import Cell

MEANS = ("visual_tokens", "visual_kept", "visual_per_layer", "evidence_recall")
COSTS = ("prefill_ms", "speedup", "speedup_low", "speedup_high", "kv_bytes")
VERSUS = ("versus_unpruned", "versus_random", "versus_reference")


@dataclass(frozen=True)
class Row:
    """One run, summarized.

    Parameters
    ----------
    versus_unpruned, versus_random, versus_reference : Paired or None
        Against the unpruned cell, `random` at the same budget, and the run that ``reference`` names.
    retained : float or None
        Accuracy relative to the unpruned model's; its interval is in ``versus_unpruned``.
    visual_tokens, visual_kept, visual_per_layer : float
        Means over questions, see `vtoken.eval.model.counts.Visual`.
    evidence_recall : float or None
        Mean over the questions whose documents say where the answer is, see `vtoken.eval.model.evidence`.
    kinds : dict
        Accuracy by kind of question, where the task has kinds.
    prefill_ms, speedup, speedup_low, speedup_high, kv_bytes : float or None
        Measured cost, see `vtoken.profile.measure_prefill`.
    left_out : int
        Documents that could not be asked about.
    error : str
        What the cell raised, "" if it finished.
    source : str
        The folder it was read from, where several are compared.
    seed : int or None
        None where no seed matters, or for a row over several.
    seeds : int
        How many the row is over.
    seed_spread : float or None
        Standard deviation of the accuracy over them.
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
    speedup_low: float | None = None
    speedup_high: float | None = None
    kv_bytes: float | None = None
    error: str = ""
    source: str = ""
    seed: int | None = 0
    versus_random: Paired | None = None
    versus_reference: Paired | None = None
    reference: str = ""
    evidence_recall: float | None = None
    left_out: int = 0
    seeds: int = 1
    seed_spread: float | None = None


def summarize(cells: Sequence[Cell], store: Store) -> list[Row]:
    """One row per reducer and budget of the cells that were finished or failed, in their order; see `over_seeds`."""
    return rows_of(over_seeds(runs_of(cells, store)))


def rows_of(runs: Sequence[Run], references: Mapping[tuple[str, str], Run] | None = None) -> list[Row]:
    """One row per run.

    Parameters
    ----------
    runs : sequence of Run
        In the order of the table.
    references : mapping, optional
        Source and id of a run -> the run that it is compared with, besides the unpruned and the random one of its own
        folder.
    """
    others = references or {}
    finished = [run for run in runs if run.samples]
    unpruned: dict[Group, list[Run]] = defaultdict(list)
    random: dict[tuple[Group, Any], list[Run]] = defaultdict(list)
    for run in finished:
        if run.reducer == UNPRUNED:
            unpruned[run.group].append(run)
        elif run.reducer == RANDOM:
            random[run.group, run.keep].append(run)
    rows = []
    for run in runs:
        row = _row(run)
        if run.samples:
            whole = counterpart(run, unpruned[run.group])
            control = counterpart(run, random[run.group, run.keep])
            row = _compared(row, run, (whole, control, others.get((run.source, run.id))))
        rows.append(row)
    return corrected(rows)


def corrected(rows: Sequence[Row]) -> list[Row]:
    """Rows with Holm's correction: over the rows of a model and task, for each of the three comparisons."""
    out = list(rows)
    for name in VERSUS:
        tables: dict[tuple[str, ...], list[int]] = {}
        for number, row in enumerate(out):
            if getattr(row, name) is not None:
                tables.setdefault((row.source, row.model, row.task), []).append(number)
        for numbers in tables.values():
            found = [getattr(out[i], name) for i in numbers]
            for i, versus, p in zip(numbers, found, holm([v.p_value for v in found]), strict=True):
                change: dict[str, Any] = {name: dataclasses.replace(versus, adjusted=p)}
                out[i] = dataclasses.replace(out[i], **change)
    return out


def compare_runs(run: Run, other: Run) -> Paired | None:
    """Question by question, where both were asked the same ones; None if they have none in common."""
    theirs = {sample["doc_id"]: sample for sample in other.samples}
    same_data = run.record.cell.task == other.record.cell.task
    pairs = [
        (sample, twin)
        for sample in run.samples
        if (twin := theirs.get(sample["doc_id"])) and _same_question(sample, twin, same_data)
    ]
    if not pairs:
        return None
    ours, others = zip(*pairs, strict=True)
    found = paired([s["score"] for s in ours], [s["score"] for s in others], _clusters(ours))
    several = run.by_seed or other.by_seed  # whose answers to one question may differ
    changed = None if several else sum(a["answer"] != b["answer"] for a, b in pairs)
    return dataclasses.replace(found, changed=changed)


def _same_question(sample: dict, twin: dict, same_data: bool) -> bool:
    """Equal prompts and pixels; or, where a task phrases prompts by model, the same data, picture and answer."""
    if sample.get("prompt") and sample.get("prompt") == twin.get("prompt"):
        return True
    return same_data and all(sample.get(key) == twin.get(key) for key in ("target", "cluster"))


def _row(run: Run) -> Row:
    names = {
        "cell": run.id,
        "model": run.model,
        "task": run.task,
        "reducer": run.reducer,
        "keep": run.keep,
        "seed": run.seed,
    }
    if not run.samples:
        return Row(**names, source=run.source, error=run.error or "no documents")
    means: dict[str, Any] = {name: _mean(run.samples, name) for name in MEANS}
    costs: dict[str, Any] = {name: run.profile.get(name) for name in COSTS}
    return Row(
        **names,
        **means,
        **costs,
        source=run.source,
        documents=len(run.samples),
        left_out=len(run.record.result.left_out) if run.record.result else 0,
        accuracy=accuracy([s["score"] for s in run.samples], _clusters(run.samples)),
        kinds=_by_kind(run.samples),
        seeds=max(len(run.by_seed), 1),
        seed_spread=stdev(run.by_seed) if run.by_seed else None,
    )


def _compared(row: Row, run: Run, against: tuple[Run | None, Run | None, Run | None]) -> Row:
    unpruned, random, reference = (other if other is not run else None for other in against)
    versus = compare_runs(run, unpruned) if unpruned else None
    retained = 1.0 if run.reducer == UNPRUNED else versus.retained.value if versus and versus.retained else None
    return dataclasses.replace(
        row,
        versus_unpruned=versus,
        retained=retained,
        versus_random=compare_runs(run, random) if random and run.reducer != UNPRUNED else None,
        versus_reference=compare_runs(run, reference) if reference else None,
        reference=f"{reference.source}: {reference.name}" if reference else "",
    )


def _clusters(samples: Iterable[dict]) -> list[str]:
    """The picture of each question; one without a picture stands for itself."""
    return [s["cluster"] or f"document {s['doc_id']}" for s in samples]


def _mean(samples: Sequence[dict], name: str) -> float | None:
    values = [s["tokens"][name] for s in samples if name in s["tokens"]]
    return fmean(values) if values else None


def _by_kind(samples: Sequence[dict]) -> dict[str, float] | None:
    kinds = list(dict.fromkeys(s["kind"] for s in samples if s["kind"]))
    return {kind: fmean(s["score"] for s in samples if s["kind"] == kind) for kind in kinds} or None


def row_from(data: Mapping[str, Any]) -> Row:
    """A row out of ``results.json``."""
    fields = dict(data)
    if mean := fields.get("accuracy"):
        fields["accuracy"] = Estimate(**mean)
    for name in VERSUS:
        if versus := fields.get(name):
            estimates = {key: Estimate(**versus[key]) for key in ("difference", "retained") if versus.get(key)}
            fields[name] = Paired(**{**versus, **estimates})
    return Row(**fields)
