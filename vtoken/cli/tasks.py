# SPDX-License-Identifier: Apache-2.0
"""``vtoken tasks``: what reducers can be compared on."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from vtoken.cli.console import out, sentences


def tasks_command(
    pattern: Annotated[
        str | None, typer.Argument(help="A name with wildcards, such as '*_lite'; '*' lists all of lmms-eval's.")
    ] = None,
) -> None:
    """What can be run, what it needs, and what silently goes wrong with it."""
    with sentences():
        from vtoken.eval.harness import catalogue

        infos = catalogue.matching(pattern) if pattern else [*catalogue.bundled(), *catalogue.notable()]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("task", no_wrap=True)
    for name in ("asks", "needs", "trap"):
        table.add_column(name)
    for info in infos:
        table.add_row(escape(info.name), escape(info.asks), ", ".join(info.needs), escape(info.trap))
    console = out()
    console.print(table)
    console.print(
        "login: hf auth login, even for public data. judge key: the scoring asks another model, see the task's README "
        "in lmms-eval.",
        highlight=False,
    )
    if not pattern:
        console.print("vtoken tasks '*' lists all of lmms-eval's tasks and groups.", highlight=False)
