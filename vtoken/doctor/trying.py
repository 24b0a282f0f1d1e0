# SPDX-License-Identifier: Apache-2.0
"""Every registered reducer on this model: it works, or says why it does not."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from vtoken.adapters import Adapter
from vtoken.doctor.outcome import of_error
from vtoken.doctor.prompts import Prompts
from vtoken.doctor.report import ReducerRow
from vtoken.doctor.runs import steps
from vtoken.reducers.base import KeepReducer, Reducer
from vtoken.registry import get_reducer, list_reducers
from vtoken.wrapping import reduce, stats


class Candidate(NamedTuple):
    """A reducer, and what it is called in the report."""

    label: str
    reducer: Reducer


def chosen(names: Sequence[str] | None, keeps: Sequence[Any]) -> list[Candidate]:
    """The reducers to try, each with every keep; those without a budget once.

    Raises
    ------
    ValueError
        If a name is unknown or a keep out of range.
    """
    out = []
    for name in names or list_reducers():
        plain = get_reducer(name)
        if isinstance(plain, KeepReducer):
            out += [Candidate(f"{name} at {keep}", get_reducer(name, keep=keep)) for keep in keeps]
        else:
            out.append(Candidate(name, plain))
    return out


def try_all(
    model: Any, adapter: Adapter, prompts: Prompts, candidates: Sequence[Candidate], seconds: float
) -> Iterator[ReducerRow]:
    """A row for each reducer; behind ``seconds`` the rest is left out and said to be."""
    started = time.perf_counter()
    for candidate in candidates:
        if time.perf_counter() - started > seconds:
            text = f"Left out, as the others took {seconds:.0f} s: name it with -r to try it."
            yield ReducerRow(reducer=candidate.label, parameters=str(candidate.reducer), status="skipped", detail=text)
        else:
            yield _row(model, adapter, prompts, candidate)


def _row(model: Any, adapter: Adapter, prompts: Prompts, candidate: Candidate) -> ReducerRow:
    try:
        return _tried(model, adapter, prompts, candidate)
    except Exception as error:  # a reducer of the user's may raise anything
        found, what = of_error(error), str(candidate.reducer)
        return ReducerRow(reducer=candidate.label, parameters=what, status=found.status, detail=found.detail)


def _tried(model: Any, adapter: Adapter, prompts: Prompts, candidate: Candidate) -> ReducerRow:
    reducer = candidate.reducer
    banned = [token for token in adapter.placeholders.values() if token is not None]
    with reduce(model, reducer):
        answer = steps(model, prompts.batch, 2, banned)
        found = stats(model)
    row = ReducerRow(
        reducer=candidate.label,
        parameters=str(reducer),
        status="passed",
        detail=str(found).partition(" (")[0],
        tokens_in=found.tokens_in,
        tokens_kept=found.tokens_kept,
        tokens_per_layer=found.tokens_per_layer,
        selection_ms=found.selection_seconds * 1e3,
    )
    if bool(answer.logits.isnan().any()):
        return row.model_copy(update={"status": "failed", "detail": "Its logits are not finite."})
    if reducer.is_identity or found.tokens_per_layer < found.tokens_in or found.light:
        return row
    return row.model_copy(update={"status": "unproven", "detail": f"It dropped nothing here: {row.detail}"})
