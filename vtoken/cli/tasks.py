# SPDX-License-Identifier: Apache-2.0
"""``vtoken tasks``: what reducers can be compared on."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.table import Table

from vtoken.cli.console import out, sentences

NOTES = {
    "mini": "all kinds of questions of the embedded models, interleaved",
    "mini_existence": "is there a red circle ?",
    "mini_color": "what color is the circle ?",
    "mini_shape": "what shape is the red thing ?",
    "mini_position": "where is the red circle ?",
    "mini_relation": "is the red circle left of the blue square ?",
    "mini_count": "how many circles are there ?",
    "mini_digit": "what is the digit ? (handwritten)",
    "mini_word": "what does the text say ?",
}


def tasks_command(
    every: Annotated[bool, typer.Option("--all", help="Also the tasks of lmms-eval (imports it: seconds).")] = False,
) -> None:
    """The bundled tasks, which need no download; --all adds lmms-eval's."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("task", no_wrap=True)
    table.add_column("asks")
    for name, note in NOTES.items():
        table.add_row(name, note)
    console = out()
    console.print(table)
    if not every:
        console.print("With --all: the tasks of lmms-eval, such as gqa_lite, textvqa_val_lite, pope.", highlight=False)
        return
    with sentences():
        from vtoken.eval.tasksource import foreign_tasks

        names = foreign_tasks()
    console.print("\n".join(names), highlight=False)
