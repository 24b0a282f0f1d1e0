# SPDX-License-Identifier: Apache-2.0
"""Live progress of a race of settings: a bar of the questions until the next look, and a line per look."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vtoken.cli.console import bar
from vtoken.eval.model.loading import ModelSpec
from vtoken.eval.sweeps.cells import Cell
from vtoken.eval.tune.asking import RaceListener
from vtoken.eval.tune.race import Race, Verdict


class RaceProgress(RaceListener):
    """Shows who is still in the race.

    Parameters
    ----------
    console : Console
        Where to.
    """

    def __init__(self, console: Console) -> None:
        times = TimeElapsedColumn(), TimeRemainingColumn()
        self.console = console
        self.bars = bar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times, console=console)
        self.bar = self.bars.add_task("reading questions", total=None)

    def __enter__(self) -> RaceProgress:
        self.bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bars.stop()

    def loading(self, spec: ModelSpec) -> None:
        """See `Listener`."""
        self.bars.reset(self.bar, description=f"loading {spec.pretrained}", total=None)

    def measuring(self, runs: int) -> None:
        """See `RaceListener`."""
        self.bars.reset(self.bar, description="measuring costs", total=runs)

    def ran(self) -> None:
        """See `RaceListener`."""
        self.bars.advance(self.bar)

    def asking(self, questions: int) -> None:
        """See `RaceListener`."""
        self.bars.reset(self.bar, description="asking", total=questions)

    def answered(self, cell: Cell, count: int) -> None:
        """See `Listener`."""
        self.bars.advance(self.bar, count)

    def waiting(self, cells: Sequence[Cell]) -> None:
        """See `Listener`."""
        self.bars.update(self.bar, description=f"waiting for {len(cells)} cells of other runners")

    def trouble(self, text: str) -> None:
        """See `Listener`."""
        self.console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def looked(self, race: Race) -> None:
        """See `RaceListener`."""
        asked = max((standing.units for standing in race.standings), default=0)
        if not asked:
            return
        best = f"; {race.best.setting.name} holds" if race.best is not None else ""
        out = sum(standing.verdict not in (Verdict.OPEN, Verdict.HOLDS) for standing in race.standings)
        text = f"after {asked} of {race.units} pictures a task: {len(race.open)} undecided, {out} out{best}"
        self.console.print(text, markup=False, highlight=False)
