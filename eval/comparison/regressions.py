# SPDX-License-Identifier: Apache-2.0
"""The worst regressions: questions that the unpruned model answers and a reduced one does not, for a look."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from vtoken.eval.comparison.runs import RANDOM, Group, Run
from vtoken.eval.comparison.seeds import counterpart
from vtoken.eval.store.record import UNPRUNED


@dataclass(frozen=True)
class Regression:
    """One question before and after.

    Parameters
    ----------
    run : Run
        The reduced one.
    doc_id : int
        The document.
    target, before, after : str
        The right answer, the unpruned model's and the reduced one's.
    drop : float
        Lost score.
    """

    run: Run
    doc_id: int
    target: str
    before: str
    after: str
    drop: float


def worst_regressions(runs: Sequence[Run], count: int) -> list[Regression]:
    """Losses that surprise most: large ones first, at large budgets.

    Each document is shown once, every reducer has its turn before one comes again, and `random` comes last.
    """
    turns: Counter[str] = Counter()
    queue = []
    for place, candidate in enumerate(sorted(_regressions(runs), key=_rank)):
        control = candidate.run.reducer == RANDOM
        queue.append(((control, turns[candidate.run.reducer], place), candidate))
        turns[candidate.run.reducer] += 1
    chosen: dict[tuple[str, int], Regression] = {}
    for _, candidate in sorted(queue, key=lambda entry: entry[0]):
        if len(chosen) == count:
            break
        chosen.setdefault((candidate.run.task, candidate.doc_id), candidate)
    return list(chosen.values())


def _regressions(runs: Sequence[Run]) -> list[Regression]:
    unpruned: dict[Group, list[Run]] = defaultdict(list)
    for run in runs:
        if run.reducer == UNPRUNED:
            unpruned[run.group].append(run)
    found = []
    for run in runs:
        whole = counterpart(run, unpruned[run.group])
        if whole is None or run.reducer == UNPRUNED:
            continue
        before = {sample["doc_id"]: sample for sample in whole.samples}
        for sample in run.samples:
            other = before.get(sample["doc_id"])
            if other is not None and other["score"] > sample["score"]:
                answers = str(sample.get("target")), str(other["answer"]), str(sample["answer"])
                found.append(Regression(run, sample["doc_id"], *answers, drop=other["score"] - sample["score"]))
    return found


def _rank(found: Regression) -> tuple:
    kept = [sample["tokens"].get("visual_per_layer", 0) for sample in found.run.samples]
    return -found.drop, -sum(kept) / len(kept), found.run.reducer, found.doc_id
