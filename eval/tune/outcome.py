# SPDX-License-Identifier: Apache-2.0
"""What is said in the end: sentences, a table, a preset, and everything as plain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from vtoken.eval.errors import first_line
from vtoken.eval.provenance import surroundings
from vtoken.eval.sweeps.cells import plain
from vtoken.eval.tune.costs import BARE, OBJECTIVES, UNITS
from vtoken.eval.tune.race import ERROR, Standing, Verdict
from vtoken.eval.tune.tuning import Tuned

CONFIDENCE = f"{100 * (1 - ERROR):.0f} %"


def sentences(tuned: Tuned) -> list[str]:
    """What a user wants to know; the first says whether there is a choice, and which."""
    found = [_choice(tuned, tuned.best) if tuned.best is not None else _none(tuned), *_by_task(tuned), *_more(tuned)]
    failed = [s for s in tuned.race.standings if s.verdict is Verdict.FAILED]
    return [*found, *(f"{s.setting.name} failed: {first_line(s.why)}" for s in failed)]


def _choice(tuned: Tuned, best: Standing) -> str:
    return (
        f"{best.setting.name} retains at least {100 * tuned.race.retain:g} % of the accuracy of {tuned.model} on "
        f"{_listed(tuned.tasks)}, with {CONFIDENCE} confidence ({_percent(best.retained)} on "
        f"{_asked(tuned, best.units)}), at {_percent(best.setting.cost, 0)} of the {OBJECTIVES[tuned.objective]}."
    )


def _none(tuned: Tuned) -> str:
    race, what = tuned.race, OBJECTIVES[tuned.objective]
    running = [s for s in race.standings if s.verdict is not Verdict.FAILED]
    if running and all(s.verdict is Verdict.NO_GAIN for s in running):
        least = running[0].setting
        return (
            f"No setting is cheaper than the unpruned model in {what} on this machine: {least.name} comes to "
            f"{_percent(least.cost, 0)} of it, so try another objective or prompts with more visual tokens."
        )
    tried = [s for s in race.standings if s.retained is not None]
    most = max(tried, key=lambda s: s.retained or 0.0, default=None)
    seen = f": the most so far is {_percent(most.retained)} by {most.setting.name}" if most else ""
    return (
        f"No setting is shown to retain {100 * race.retain:g} % of the accuracy of {tuned.model} on "
        f"{_listed(tuned.tasks)} with {CONFIDENCE} confidence{seen}."
    )


def _by_task(tuned: Tuned) -> Iterator[str]:
    best = tuned.best
    if best is not None and len(tuned.tasks) > 1:
        parts = (f"{task} {_percent(share)}" for task, share in zip(tuned.tasks, best.by_task, strict=True))
        yield f"By task: {', '.join(parts)}; the bound is on the mean over the tasks."


def _more(tuned: Tuned) -> Iterator[str]:
    """Who could be decided by more questions: the cheapest that is cheaper than the choice, or the nearest to one."""
    race, best = tuned.race, tuned.best
    limit = best.setting.cost if best is not None else math.inf
    undecided = [
        (standing, more)
        for standing in race.standings
        if standing.verdict in (Verdict.OPEN, Verdict.HOPELESS)
        and standing.setting.cost < limit
        and (more := race.needed(standing)) is not None
    ]
    if undecided:
        standing, more = undecided[0] if best else min(undecided, key=lambda pair: pair[0].units + pair[1])
        total = tuned.questions(standing.units + more)
        yield (
            f"{standing.setting.name} may hold{' too' if best else ''}, at {_percent(standing.setting.cost, 0)} of the "
            f"cost ({_percent(standing.retained)} on {_asked(tuned, standing.units)}): about {total:,} questions of "
            f"each task would decide, there were {tuned.questions(race.units):,}."
        )
    elif best is None and any(standing.units for standing in race.standings):
        yield "More questions would not help: try larger keep ratios, other reducers or a lower target."


def legend(tuned: Tuned) -> str:
    """What the columns of the table mean."""
    return (
        "cost: of the unpruned model's, measured on this machine on prompts of the tasks. retained: accuracy over that "
        "of the unpruned model on the same questions; each of its bounds is wrong with a probability of at most "
        f"{100 * tuned.race.alpha:.3g} %, however often one looks. A setting holds if its lower bound reaches the "
        f"target and all larger budgets of its reducer hold: that any is wrongly said to has at most {100 * ERROR:g} %."
    )


COLUMNS: dict[str, Callable[[Tuned, Standing], str]] = {
    "reducer": lambda tuned, s: s.setting.reducer,
    "keep": lambda tuned, s: "" if s.setting.keep is None else f"{s.setting.keep:g}",
    "cost": lambda tuned, s: _percent(s.setting.cost, 0),
    "absolute": lambda tuned, s: cost_text(tuned, s.setting.name),
    "retained [bounds]": lambda tuned, s: retained_text(tuned, s),
    "questions": lambda tuned, s: str(tuned.questions(s.units)),
    "": lambda tuned, s: "the choice" if s is tuned.best else s.verdict.value,
}


def table(tuned: Tuned) -> list[list[str]]:
    """Cells of `COLUMNS`: who retains more than everybody who is cheaper, and the choice; the unpruned model last."""
    shown = [s for s in tuned.race.standings if s is tuned.best or s in list(tuned.race.front)]
    rows = [[column(tuned, s) for column in COLUMNS.values()] for s in shown]
    return [*rows, ["unpruned", "", "100 %", cost_text(tuned, BARE), "100.0 %", "", ""]]


def cost_text(tuned: Tuned, name: str) -> str:
    """A cost in its own unit, with half the interquartile range of what is timed."""
    if name not in tuned.costs:
        return ""
    cost, unit = tuned.costs[name][tuned.objective], UNITS[tuned.objective]
    spread = f" ± {cost['iqr'] / 2:.2g}" if "iqr" in cost else ""
    return f"{cost['value']:.3g}{spread} {unit}"


def retained_text(tuned: Tuned, standing: Standing) -> str:
    """Percent with both bounds."""
    if standing.retained is None:
        return ""
    low, high = tuned.race.bounds(standing)
    return f"{_percent(standing.retained)} [{100 * low:.1f}, {'∞' if math.isinf(high) else f'{100 * high:.1f}'}]"


def preset(tuned: Tuned, best: Standing) -> str:
    """YAML from which `vtoken.wrap` builds the choice, with how it was found."""
    lines = [*sentences(tuned)[:1], f"Found by vtoken tune, vtoken {surroundings()['vtoken']}."]
    config = yaml.safe_dump(plain(tuned.reducers[best.setting.name].config()), sort_keys=False)
    return "".join(f"# {line}\n" for line in lines) + config


def as_data(tuned: Tuned) -> dict[str, Any]:
    """Everything that is known, for JSON."""
    race = tuned.race
    return {
        "model": tuned.model,
        "tasks": tuned.tasks,
        "retain": race.retain,
        "objective": tuned.objective,
        "error": ERROR,
        "units": race.units,
        "questions_per_unit": tuned.questions_per_unit,
        "sentences": sentences(tuned),
        "choice": plain(tuned.reducers[tuned.best.setting.name].config()) if tuned.best else None,
        "unpruned": tuned.costs[BARE],
        "settings": [_setting(tuned, standing) for standing in race.standings],
        "made_with": surroundings(),
    }


def _setting(tuned: Tuned, standing: Standing) -> dict[str, Any]:
    setting, (low, high) = standing.setting, tuned.race.bounds(standing)
    return {
        "reducer": setting.reducer,
        "keep": setting.keep,
        "cost": setting.cost,
        "costs": tuned.costs.get(setting.name),
        "units": standing.units,
        "retained": standing.retained,
        "low": low,
        "high": None if math.isinf(high) else high,
        "by_task": dict(zip(tuned.tasks, standing.by_task, strict=False)),
        "verdict": standing.verdict.value,
        "why": standing.why,
    }


def _percent(share: float | None, digits: int = 1) -> str:
    return f"{100 * (share or 0.0):.{digits}f} %"


def _asked(tuned: Tuned, units: int) -> str:
    return f"{tuned.questions(units):,} questions" + (" of each task" if len(tuned.tasks) > 1 else "")


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
