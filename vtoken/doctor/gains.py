# SPDX-License-Identifier: Apache-2.0
"""What a reducer costs and saves on this prompt, by `vtoken.profile`, and whether it is long enough to gain."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from vtoken.adapters import Adapter
from vtoken.doctor.outcome import of_error
from vtoken.doctor.prompts import Prompts, twice
from vtoken.doctor.report import Cost
from vtoken.doctor.runs import Inputs
from vtoken.doctor.trying import Candidate
from vtoken.profile import profile
from vtoken.profile.breakeven import Point, break_even
from vtoken.profile.run import run_once
from vtoken.profile.spread import alternate
from vtoken.reducers.base import Reducer

ROUNDS = 3
NEW = 4


def measured(model: Any, adapter: Adapter, prompts: Prompts, candidate: Candidate) -> tuple[Cost, str]:
    """Times of the first prompt and, for the break-even, of one with twice the pictures; why that is missing, or ""."""
    reducer = candidate.reducer
    found = profile(model, reducer, prompts.first, new_tokens=NEW, rounds=ROUNDS)
    sides = {"unpruned": found.unpruned, "reduced": found.reduced}
    tokens = int((adapter.modality_in(prompts.first) > 0).sum())
    before, after = found.unpruned.milliseconds, found.reduced.milliseconds
    points = [Point(tokens, before["prefill"].median, after["prefill"].median, after["selection"].median)]
    why = ""
    try:
        points.append(_point(model, reducer, twice(prompts.first), 2 * tokens))
    except Exception as error:  # not every model takes two pictures in one prompt, or has room for them
        why = f"a prompt with twice the pictures cannot be run ({of_error(error).detail})"
    cost = Cost(
        reducer=candidate.label,
        attention=found.attention,
        milliseconds={
            name: {phase: spread.median for phase, spread in side.milliseconds.items()} for name, side in sides.items()
        },
        kv_bytes={name: side.kv_bytes for name, side in sides.items()},
        tokens={name: side.tokens for name, side in sides.items()},
        prefill_speedup=found.ratios["prefill"].value,
        prefill_quartiles=(found.ratios["prefill"].low, found.ratios["prefill"].high),
        decode_speedup=found.speedup("decode"),
        break_even=break_even(points) if len(points) > 1 else None,
        break_even_points=[{name: float(value) for name, value in point._asdict().items()} for point in points],
    )
    return cost, why


def _point(model: Any, reducer: Reducer, inputs: Inputs, tokens: int) -> Point:
    runs = {
        "plain": lambda: run_once(model, None, inputs, 2),
        "reduced": lambda: run_once(model, reducer, inputs, 2),
    }
    found = alternate(runs, ROUNDS)
    prefill = {name: median(run.prefill for run in done) for name, done in found.items()}
    selection = median(run.selection for run in found["reduced"])
    return Point(tokens, prefill["plain"], prefill["reduced"], selection)


def pays(cost: Cost, why: str) -> str:
    """Whether the prompt has enough visual tokens to gain anything, in a sentence."""
    before, after = cost.milliseconds["unpruned"], cost.milliseconds["reduced"]
    tokens = cost.break_even_points[0]["tokens"]
    text = (
        f"{cost.reducer}: prefill {before['prefill']:.4g} -> {after['prefill']:.4g} ms "
        f"({after['selection']:.3g} ms of it to select), decoding {before['decode']:.3g} -> {after['decode']:.3g} ms a "
        f"token, cache {cost.kv_bytes['unpruned'] / 2**20:.4g} -> {cost.kv_bytes['reduced'] / 2**20:.4g} MiB; "
    )
    if why:
        return f"{text}no break-even, as {why.rstrip('.')}."
    if cost.break_even is None:
        return f"{text}up to {2 * tokens:.0f} visual tokens selecting costs more than it saves."
    enough = "enough" if tokens >= cost.break_even else "too few"
    return f"{text}{tokens:.0f} visual tokens are {enough}, it pays from about {cost.break_even:.0f} on."


def to_measure(candidates: Sequence[Candidate], working: Sequence[str]) -> Candidate | None:
    """The reducer to measure: the default one of ``vtoken profile`` if it works, else the first that does."""
    able = [one for one in candidates if one.label in working and not one.reducer.is_identity]
    return next((one for one in able if one.reducer.name == "idpruner"), next(iter(able), None))
