# SPDX-License-Identifier: Apache-2.0
"""The ``vtoken`` command. Every command is a file of its own and is registered here.

All of these files are imported for any command: what takes long to import belongs inside of the functions that use it.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import vtoken
from vtoken.cli import (
    catalogue,
    compare,
    demo,
    doctor,
    profile,
    report,
    rerun,
    show,
    sweep,
    tasks,
    train_gate,
    train_scorer,
    tune,
)

app = typer.Typer(
    name="vtoken",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("list")(catalogue.list_command)
app.command("compare")(compare.compare_command)
app.command("sweep")(sweep.sweep_command)
app.command("report")(report.report_command)
app.command("rerun")(rerun.rerun_command)
app.command("show")(show.show_command)
app.command("demo")(demo.demo_command)
app.command("tune")(tune.tune_command)
app.command("profile")(profile.profile_command)
app.command("doctor")(doctor.doctor_command)
app.command("tasks")(tasks.tasks_command)
app.command("train-gate")(train_gate.train_gate_command)
app.command("train-scorer")(train_scorer.train_scorer_command)

AT_ONCE = {"list": catalogue.list_command, "tasks": tasks.tasks_command}
"""Called as they are where they stand alone: typer needs a fifth of a second to check arguments, with pydantic."""


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"vtoken {vtoken.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Fewer visual tokens for vision-language models, without training.

    Exit codes: 0 done, 1 something failed, 2 wrong input, 130 interrupted.
    """


def main() -> None:
    """Entry point of the console script."""
    if len(sys.argv) == 2 and sys.argv[1] in AT_ONCE:
        try:
            AT_ONCE[sys.argv[1]]()
        except typer.Exit as end:
            sys.exit(end.exit_code)
    else:
        app()
