# SPDX-License-Identifier: Apache-2.0
"""The ``vtoken`` command. Every command is a file of its own and is registered here.

All of these files are imported for any command: what takes long to import belongs inside of the functions that use it.
"""

from __future__ import annotations

import typer

from vtoken.cli import catalogue, compare, profile, report, show, sweep, tasks, train_gate, train_scorer

app = typer.Typer(
    name="vtoken",
    help="Fewer visual tokens for vision-language models, without training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("list")(catalogue.list_command)
app.command("compare")(compare.compare_command)
app.command("sweep")(sweep.sweep_command)
app.command("report")(report.report_command)
app.command("show")(show.show_command)
app.command("profile")(profile.profile_command)
app.command("tasks")(tasks.tasks_command)
app.command("train-gate")(train_gate.train_gate_command)
app.command("train-scorer")(train_scorer.train_scorer_command)


def main() -> None:
    """Entry point of the console script."""
    app()
