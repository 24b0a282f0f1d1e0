# SPDX-License-Identifier: Apache-2.0
"""Asks settings the same questions and measures what they cost, into a results folder that remembers both.

Every part of a task under every setting is a cell like those of a sweep: written atomically, locked, resumed in its
middle. Who is asked what is decided elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np

from vtoken.eval.comparison.runs import runs_of
from vtoken.eval.errors import EvalError
from vtoken.eval.harness.tasksource import load_task
from vtoken.eval.running.cost import BATCH, first_inputs
from vtoken.eval.running.listener import Listener
from vtoken.eval.running.runner import Runner
from vtoken.eval.store.results import Store
from vtoken.eval.sweeps.cells import Cell
from vtoken.eval.tune.costs import BARE, ROUNDS, Costs, measure
from vtoken.eval.tune.race import Race
from vtoken.eval.tune.units import Part, Unit, cut, looks, part_of, shuffled_units, within


class RaceListener(Listener):
    """Told what happens while settings are tried; override what is of interest."""

    def measuring(self, runs: int) -> None:
        """Costs are measured, in so many runs."""

    def ran(self) -> None:
        """One of these runs is over."""

    def asking(self, questions: int) -> None:
        """Until the next look at the answers, so many questions are asked, all settings together."""

    def looked(self, race: Race) -> None:
        """Conclusions have been drawn: before the first question, and after each look."""


class PartRunner(Runner):
    """Runs cells whose task is a part of one."""

    def task(self, cell: Cell) -> Any:
        """See `Runner`."""
        whole = super().task(cell)
        return part_of(whole, cell.task) if isinstance(cell.task, Part) else whole


class Asker:
    """All settings on all tasks.

    Parameters
    ----------
    cells : dict
        Name of a setting -> its cell on each whole task, in the same order of tasks for all; `BARE` is the unpruned
        model.
    store : Store
        Where answers and costs go and come from.
    listener : RaceListener
        Told about progress.
    questions : int, optional
        Most questions of a task to ask.

    Attributes
    ----------
    units : int
        How many there are to ask; each takes one picture of every task.
    moments : list of int
        After how many units one looks at the answers.

    Raises
    ------
    EvalError
        If a task has no questions, or there is room for less than one unit.
    """

    def __init__(
        self, cells: dict[str, list[Cell]], store: Store, listener: RaceListener, questions: int | None
    ) -> None:
        self.cells, self.store, self.listener = cells, store, listener
        self.runner = PartRunner(store, listener)
        chosen = [within(_units(cell), questions) for cell in cells[BARE]]
        self.units = min(map(len, chosen))
        if not self.units:
            raise EvalError(
                "A task has no questions: choose another."
                if questions is None
                else f"{questions} questions are not enough for one picture: allow more."
            )
        self.moments = looks(self.units)
        self.parts = [cut(units, self.moments, cell.task) for units, cell in zip(chosen, cells[BARE], strict=True)]
        self.questions_per_unit = fmean(len(unit) for units in chosen for unit in units[: self.units])

    def ask(self, names: Sequence[str], look: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Ask settings, and the unpruned model, what comes before one look and after the one before it.

        Returns
        -------
        scores : dict
            Name -> (units, tasks) means of the units' scores; that of the unpruned model is `BARE`.
        failed : dict
            Name -> what a setting raised.

        Raises
        ------
        EvalError
            If the unpruned model cannot be asked, or a score is no share.
        """
        cells = {name: self._parts(name, look) for name in (BARE, *names)}
        every = [cell for found in cells.values() for cell in found]
        self.listener.asking(sum(cell.limit or 0 for cell in every if self.store.result(cell.id) is None))
        self.runner.run(cells[BARE])
        scores = {BARE: self._scores(cells[BARE])}
        failed = {}
        self.runner.run([cell for name in names for cell in cells[name]])
        for name in names:
            try:
                scores[name] = self._scores(cells[name])
            except EvalError as error:
                failed[name] = str(error)
        return scores, failed

    def _parts(self, name: str, look: int) -> list[Cell]:
        chosen = [parts[look] for parts in self.parts]
        return [
            dataclasses.replace(cell, task=part, limit=len(part.documents))
            for cell, part in zip(self.cells[name], chosen, strict=True)
        ]

    def _scores(self, cells: Sequence[Cell]) -> np.ndarray:
        columns = []
        for cell, run in zip(cells, runs_of(cells, self.store), strict=True):
            if run.error:
                raise EvalError(run.error)
            scores = [sample["score"] for sample in run.samples]
            wrong = next((score for score in scores if not 0 <= score <= 1), None)
            if wrong is not None:
                raise EvalError(
                    f"Task {cell.task.name!r} scores a question with {wrong:g}, and only scores from 0 to 1 can be "
                    "bounded: choose another task."
                )
            assert isinstance(cell.task, Part)
            columns.append(cell.task.means(scores))
        return np.stack(columns, axis=1)

    def costs(self) -> tuple[dict[str, Costs], dict[str, str]]:
        """What each setting and the unpruned model cost, as means over the tasks; measured where that was not done.

        Returns
        -------
        costs, failed : dict
            As in `vtoken.eval.tune.costs.measure`.
        """
        failed: dict[str, str] = {}
        for number, bare in enumerate(self.cells[BARE]):
            left = {
                name: reducer
                for name, cells in self.cells.items()
                if (reducer := cells[number].reducer) and name not in failed and self._saved(name)[number] is None
            }
            if left:
                model = self.runner.model(bare)
                self.listener.measuring((len(left) + 1) * (ROUNDS + 1))
                found, broken = measure(model.model, left, first_inputs(bare, model, BATCH), ran=self.listener.ran)
                failed |= broken
                for name, costs in found.items():
                    self.store.save_profile(self._parts(name, 0)[number].id, costs)
        return {name: _mean(self._saved(name)) for name in self.cells if name not in failed}, failed

    def _saved(self, name: str) -> list[Costs | None]:
        return [self.store.profile(cell.id) for cell in self._parts(name, 0)]


def _units(cell: Cell) -> list[Unit]:
    return shuffled_units(load_task(cell.task.name, cell.model_type, cell.task.folder), cell.seed or 0)


def _mean(costs: Sequence[Costs | None]) -> Costs:
    """Over tasks, value by value."""
    known = [cost for cost in costs if cost is not None]
    return {
        objective: {key: fmean(cost[objective][key] for cost in known) for key in values}
        for objective, values in known[0].items()
    }
