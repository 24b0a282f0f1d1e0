# SPDX-License-Identifier: Apache-2.0
"""``vtoken list``: the reducers, where they act, what they cost, whose they are. It imports none of them."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from vtoken.cli.console import out, sentences
from vtoken.registry import list_presets

FILE = Path(__file__).with_name("catalogue.json")
"""Written by `vtoken.cli.describe`."""
SERVABLE = "servable: chooses from an encoded picture alone, whatever the prompt, before the decoder."


def list_command(
    pattern: Annotated[str, typer.Argument(help="Shell pattern, such as '*pru*'.")] = "*",
) -> None:
    """Every reducer: stages, what it reads or runs beside the model, whether a server could use it, paper."""
    shipped = json.loads(FILE.read_text(encoding="utf-8"))
    rows = {row[0]: row for row in shipped["reducers"]}
    with sentences():
        names = fnmatch.filter(rows, pattern)
        if not names:
            raise ValueError(f"No reducer matches {pattern!r}: known are {', '.join(rows)}.")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("reducer", "acts", "needs", "servable", "arXiv", ""):
        table.add_column(title, no_wrap=title in ("reducer", "arXiv"))
    for name in names:
        table.add_row(*rows[name])
    console = out()
    console.print(table)
    console.print(SERVABLE, highlight=False)
    if presets := list_presets():
        console.print(f"Presets: {', '.join(presets)}", highlight=False)
    console.print(f"Model families: {', '.join(shipped['families'])}", highlight=False)
