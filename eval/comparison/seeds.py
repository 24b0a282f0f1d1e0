# SPDX-License-Identifier: Apache-2.0
"""Runs that differ in their seed alone: which of them belong together, and as one run with the spread between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from vtoken.eval.comparison.runs import Run


def over_seeds(runs: Sequence[Run]) -> list[Run]:
    """The same runs, finished ones of several seeds as one, in the place of the first; failed ones stay alone."""
    families: dict[Any, list[Run]] = {}
    for run in runs:
        families.setdefault(_all_but_the_seed(run) if run.samples else run.id, []).append(run)
    return [_merged(family) if len(family) > 1 else family[0] for family in families.values()]


def _all_but_the_seed(run: Run) -> tuple:
    cell = run.record.cell
    code = cell.reducer_code, cell.reducer_files, *sorted(cell.versions.items())
    return run.group, run.reducer, run.keep, *code


def counterpart(run: Run, others: Sequence[Run]) -> Run | None:
    """What a run is compared with: of those of one reducer the one of its own seed, else all of them as one."""
    own = [other for other in others if other.seed == run.seed] or [other for other in others if other.seed is None]
    found = own or over_seeds(others)
    return found[0] if found else None


def _merged(family: Sequence[Run]) -> Run:
    """Mean scores and counts of every question that all seeds have answered."""
    first = family[0]
    answers = [{sample["doc_id"]: sample for sample in run.samples} for run in family]
    common = [doc_id for doc_id in answers[0] if all(doc_id in other for other in answers)]
    samples = [_mean([other[doc_id] for other in answers]) for doc_id in common]
    record = first.record.model_copy(update={"cell": first.record.cell.model_copy(update={"seed": None})})
    accuracies = [fmean(sample["score"] for sample in run.samples) for run in family]
    profile = next((run.profile for run in family if run.profile), {})
    return dataclasses.replace(first, record=record, samples=samples, profile=profile, by_seed=accuracies)


def _mean(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One question over its seeds; its answer where all agree."""
    same = len({sample["answer"] for sample in samples}) == 1
    names = dict.fromkeys(name for sample in samples for name in sample["tokens"])
    tokens = {name: _mean_of(sample["tokens"].get(name) for sample in samples) for name in names}
    return {
        **samples[0],
        "score": fmean(sample["score"] for sample in samples),
        "answer": samples[0]["answer"] if same else None,
        "tokens": {name: value for name, value in tokens.items() if value is not None},
    }


def _mean_of(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
