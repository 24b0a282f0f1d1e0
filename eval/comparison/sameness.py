# SPDX-License-Identifier: Apache-2.0
"""A cell that was run again beside its record: what differs, and whether that is a result or what it was made with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vtoken.eval.comparison.runs import Run

SAMPLE: tuple[tuple[str, str], ...] = (
    ("prompt", "prompts or pictures"),
    ("answer", "answers"),
    ("score", "scores"),
    ("tokens", "token counts"),
)
"""Fields of a sample that must be equal, and what they hold."""


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it was.

    Parameters
    ----------
    what : str
        Its name.
    then, now : str
        What is recorded, and what was found again.
    is_result : bool
        False for versions, machine and definition of the task, which may change without changing a result.
    """

    what: str
    then: str
    now: str
    is_result: bool = True

    def __str__(self) -> str:
        return f"{self.what}: {self.then} then, {self.now} now"


def differences(then: Run, now: Run) -> list[Difference]:
    """Everything in which two runs of a cell differ, results first."""
    return [*_results(then, now), *_samples(then, now), *_origin(then, now)]


def _results(then: Run, now: Run) -> Iterator[Difference]:
    if then.error != now.error:
        yield Difference("error", then.error or "none", now.error or "none")
    old, new = then.record.result, now.record.result
    if old is None or new is None:
        return
    asked, again = ({sample["doc_id"] for sample in run.samples} for run in (then, now))
    if asked != again:
        first = min(asked ^ again)
        yield Difference(f"documents, {first} is not in both", str(len(asked)), str(len(again)))
    yield from _unequal("metric ", old.metrics, new.metrics, is_result=True)


def _samples(then: Run, now: Run) -> Iterator[Difference]:
    again = {sample["doc_id"]: sample for sample in now.samples}
    pairs = [(sample, again[sample["doc_id"]]) for sample in then.samples if sample["doc_id"] in again]
    for field, name in SAMPLE:
        turned = [(old, new) for old, new in pairs if old.get(field) != new.get(field)]
        if turned:
            old, new = turned[0]
            what = f"{len(turned)} of {len(pairs)} {name}, the first of document {old['doc_id']}"
            yield Difference(what, repr(old.get(field)), repr(new.get(field)))


def _origin(then: Run, now: Run) -> Iterator[Difference]:
    old, new = then.record, now.record
    for what, part in _PARTS.items():
        yield from _unequal(what, part(old), part(new), is_result=False)


_PARTS: dict[str, Callable[[Any], Mapping[str, Any]]] = {
    "model ": lambda record: record.cell.model.model_dump(),
    "task ": lambda record: record.cell.task.model_dump(),
    "reducer ": lambda record: {
        "parameters": record.cell.reducer,
        "code": record.cell.reducer_code,
        "files": record.cell.reducer_files,
    },
    "data ": lambda record: {"fingerprint": record.result.dataset} if record.result else {},
    "": lambda record: {**record.cell.versions, **record.made_with},
}
"""What a result may depend on, by the name of the part."""


def _unequal(what: str, then: Mapping[str, Any], now: Mapping[str, Any], *, is_result: bool) -> Iterator[Difference]:
    for name in dict.fromkeys((*then, *now)):
        known = is_result or (name in then and name in now)  # older records do not name all versions
        if known and then.get(name) != now.get(name):
            yield Difference(f"{what}{name}", str(then.get(name)), str(now.get(name)), is_result)
