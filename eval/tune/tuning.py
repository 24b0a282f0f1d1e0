# SPDX-License-Identifier: Apache-2.0
"""From cells to a choice: checks what is asked for, measures, races, and hands over all that is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vtoken.eval.errors import EvalError, unknown
from vtoken.eval.store.results import Store
from vtoken.eval.sweeps.cells import Cell
from vtoken.eval.tune.asking import Asker, RaceListener
from vtoken.eval.tune.costs import BARE, OBJECTIVES, Costs
from vtoken.eval.tune.race import Race, Setting, Standing
from vtoken.reducers.base import Reducer

Ask = Callable[[Sequence[str], int], tuple[dict[str, np.ndarray], dict[str, str]]]


@dataclass(frozen=True)
class Tuned:
    """What came of it.

    Parameters
    ----------
    model : str
        Name, folder or hub id.
    tasks : list of str
        What was asked.
    objective : str
        What was to be cheap.
    race : Race
        All settings and what is known about them.
    reducers : dict
        Name of a setting -> its reducer.
    costs : dict
        Name of a setting -> what it costs; `BARE` is the unpruned model.
    questions_per_unit : float
        Questions of a task that stand behind one unit, on average.
    """

    model: str
    tasks: list[str]
    objective: str
    race: Race
    reducers: dict[str, Reducer]
    costs: dict[str, Costs]
    questions_per_unit: float

    @property
    def best(self) -> Standing | None:
        """The choice."""
        return self.race.best

    def questions(self, units: float) -> int:
        """About how many questions of each task so many units are."""
        return round(units * self.questions_per_unit)


def check_target(retain: float) -> None:
    """Make sure that a target can be one.

    Raises
    ------
    EvalError
        If it is not above 0 and at most 1.
    """
    if not 0 < retain <= 1:
        raise EvalError(
            f"retain={retain:g} is not possible: give the share of the accuracy to keep, above 0 and at most 1, such "
            "as 0.98."
        )


def check_objective(objective: str) -> None:
    """Make sure that an objective is known.

    Raises
    ------
    EvalError
        If it is not.
    """
    if objective not in OBJECTIVES:
        raise unknown("objective", objective, OBJECTIVES)


def candidates(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells of one sweep by setting; `BARE` is the unpruned model. Identities are left out.

    Raises
    ------
    EvalError
        If there is more than one model, or no setting.
    """
    if len({cell.model for cell in cells}) > 1:
        raise EvalError("Only one model can be tuned at a time: give one.")
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.reducer is None:
            found.setdefault(BARE, []).append(cell)
        elif not cell.reducer.is_identity:
            found.setdefault(_setting(cell).name, []).append(cell)
    if len(found) < 2:
        raise EvalError("There is nothing to choose from: give at least one reducer, and a keep ratio below 1.")
    return found


def _setting(cell: Cell, cost: float = 0.0, tokens: float = 0.0) -> Setting:
    return Setting(cell.label, cell.keep, cost, tokens)


def tune(
    cells: dict[str, list[Cell]],
    store: Store,
    *,
    retain: float,
    objective: str,
    questions: int | None = None,
    listener: RaceListener | None = None,
) -> Tuned:
    """Find the cheapest setting that retains the accuracy.

    Parameters
    ----------
    cells : dict
        See `candidates`.
    store : Store
        Where answers and costs go and come from: the same call goes on where it was stopped.
    retain : float
        The target, see `check_target`.
    objective : str
        One of `OBJECTIVES`.
    questions : int, optional
        Most questions of each task to ask.
    listener : RaceListener, optional
        Told about progress.

    Raises
    ------
    EvalError
        For a target, an objective or a task that is not possible.
    """
    check_target(retain)
    check_objective(objective)
    asker = Asker(cells, store, listener or RaceListener(), questions)
    asker.ask([], 0)  # a task that cannot be used shows before the measuring
    costs, broken = asker.costs()
    settings = {name: found[0] for name, found in cells.items() if name != BARE}
    shares = {name: (cost[objective]["share"], cost["tokens"]["share"]) for name, cost in costs.items()}
    race = Race([_setting(cell, *shares.get(name, (0.0, 0.0))) for name, cell in settings.items()], retain, asker.units)
    for standing in race.standings:
        if (why := broken.get(standing.setting.name)) is not None:
            standing.fail(why)
    run(race, asker.moments, asker.ask, asker.listener.looked)
    first = cells[BARE][0]
    return Tuned(
        model=first.model.pretrained,
        tasks=[cell.task.name for cell in cells[BARE]],
        objective=objective,
        race=race,
        reducers={name: cell.reducer for name, cell in settings.items() if cell.reducer is not None},
        costs=costs,
        questions_per_unit=asker.questions_per_unit,
    )


def run(race: Race, moments: Sequence[int], ask: Ask, looked: Callable[[Race], None] = lambda race: None) -> None:
    """Ask until nobody is open or nothing is left to ask.

    Parameters
    ----------
    race : Race
        Whose standings are filled in.
    moments : sequence of int
        After how many units one looks at the answers.
    ask : callable
        As `Asker.ask`.
    looked : callable
        Told about the race before the first question and after each look.
    """
    race.judge()
    looked(race)
    for look in range(len(moments)):
        if not (asked := race.open):
            return
        scores, failed = ask([standing.setting.name for standing in asked], look)
        for standing in asked:
            if (why := failed.get(standing.setting.name)) is None:
                standing.add(scores[standing.setting.name], scores[BARE])
            else:
                standing.fail(why)
        race.judge()
        looked(race)
