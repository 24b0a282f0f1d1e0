# SPDX-License-Identifier: Apache-2.0
"""``vtoken list``: the reducers, where they act, what they need, whose they are."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from vtoken.adapters import families
from vtoken.cli.console import out, sentences
from vtoken.reducers.base import Reducer
from vtoken.registry import list_presets, list_reducers, reducer_class

STAGES = {"in_tower": "inside tower", "before_llm": "before LLM", "in_llm": "inside LLM", "light": "light layers"}
_DEPTH = 32  # of the decoder that reducers are asked about


def list_command(
    pattern: Annotated[str, typer.Argument(help="Shell pattern, such as '*pru*'.")] = "*",
) -> None:
    """Every reducer: stages, what it needs from the model, paper."""
    with sentences():
        names = list_reducers(pattern)
        if not names:
            raise ValueError(f"No reducer matches {pattern!r}: known are {', '.join(list_reducers())}.")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("reducer", "acts", "needs", "arXiv", ""):
        table.add_column(title, no_wrap=title in ("reducer", "arXiv"))
    for name in names:
        table.add_row(*describe(reducer_class(name)))
    console = out()
    console.print(table)
    if presets := list_presets():
        console.print(f"Presets: {', '.join(presets)}", highlight=False)
    console.print(f"Model families: {', '.join(sorted(families()))}", highlight=False)


def describe(cls: type[Reducer]) -> tuple[str, str, str, str, str]:
    """Name, stages, needs, paper and summary of a reducer."""
    example = _example(cls)
    if example is None:
        return cls.name, "as its stages", "what its stages need", cls.paper, cls.summary
    stages = ", ".join(STAGES[stage] for stage in example.stages)
    return cls.name, stages, ", ".join(needs(example)) or "nothing", cls.paper, cls.summary


def needs(reducer: Reducer) -> list[str]:
    """What must be recorded while the model runs."""
    reads = (*reducer.tower_reads(), *(read.what for read in reducer.encoder_reads()))
    found = [f"tower attention ({what})" for what in reads]
    if reducer.needs_projector:
        found.append("projector")
    if reducer.resampler is not None:
        found.append("vision tower, twice")
    if taps := reducer.taps(_DEPTH):
        found.append(f"decoder attention ({', '.join(sorted(set(taps.values())))})")
    return list(dict.fromkeys(found))


def _example(cls: type[Reducer]) -> Reducer | None:
    """The reducer with default parameters; None for one that is made of others."""
    if any(field.name == "reducers" for field in dataclasses.fields(cls)):
        return None
    return cls()
