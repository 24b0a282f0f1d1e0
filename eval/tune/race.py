# SPDX-License-Identifier: Apache-2.0
"""Who is asked on, who is out, who has won; knows scores and costs, but neither models nor tasks.

The error of the whole race is controlled, not that of one setting. Every reducer is a chain of budgets, largest first.
Within a chain each budget is tested at the level of the chain, but counts only if all larger ones have passed (fixed
sequence, which needs no correction); the chains share the error probability evenly (Bonferroni). So with a probability
of at least ``1 - ERROR`` no setting that is declared to hold the target misses it, whichever is cheapest. To go from
cheap to expensive and stop at the first success would need a share for every single setting: each one that is tried
before could have passed by luck. Dropping settings early, for whatever reason, can only cost power.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from vtoken.eval.tune.betting import Bounds, bounds, convinced, further_units, gains_of, losses_of, projected

ERROR = 0.05
_OPTIMISM = 2.0  # standard errors by which a setting may be better than it looks before it is given up


class Verdict(Enum):
    """What has become of a setting."""

    OPEN = "undecided"
    HOLDS = "holds"
    BELOW = "below the target"
    HOPELESS = "not with these questions"
    AFTER = "after a larger budget that does not pass"
    COSTLIER = "costs more than the choice"
    NO_GAIN = "not cheaper than unpruned"
    FAILED = "failed"


@dataclass(frozen=True)
class Setting:
    """A reducer at a budget.

    Parameters
    ----------
    reducer : str
        Name of the reducer with its parameters; settings with equal ones are a chain.
    keep : float or int or None
        The budget, where the reducer has one.
    cost : float
        What it costs, as a share of the unpruned model's cost.
    tokens : float
        Visual tokens of its decoder layers, as a share of the unpruned model's: the order of a chain.
    """

    reducer: str
    keep: float | int | None
    cost: float
    tokens: float

    @property
    def name(self) -> str:
        """Reducer and budget, for sentences."""
        return self.reducer if self.keep is None else f"{self.reducer} {self.keep:g}"


@dataclass
class Standing:
    """What is known about a setting.

    Attributes
    ----------
    pruned, unpruned : ndarray
        (units, tasks) scores of the setting and of the unpruned model on the same units.
    shown : bool
        Whether its answers alone say that it holds the target; whether it counts depends on the larger budgets.
    why : str
        What a setting that failed has raised.
    """

    setting: Setting
    verdict: Verdict = Verdict.OPEN
    pruned: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    unpruned: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    shown: bool = False
    why: str = ""

    @property
    def units(self) -> int:
        """How many it was asked."""
        return len(self.pruned)

    @property
    def retained(self) -> float | None:
        """Retained accuracy on what was asked; None before, and where the unpruned model has nothing right."""
        return float(self.pruned.sum() / self.unpruned.sum()) if self.unpruned.sum() else None

    @property
    def by_task(self) -> list[float | None]:
        """`retained`, task by task."""
        pairs = zip(self.pruned.sum(0), self.unpruned.sum(0), strict=True)
        return [float(ours / theirs) if theirs else None for ours, theirs in pairs]

    @property
    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """(units,) ``pruned`` and ``unpruned`` over the tasks, which all count alike."""
        return self.pruned.mean(1), self.unpruned.mean(1)

    def add(self, pruned: np.ndarray, unpruned: np.ndarray) -> None:
        """Enter the scores of further units."""
        before = self.units > 0
        self.pruned = np.concatenate([self.pruned, pruned]) if before else pruned
        self.unpruned = np.concatenate([self.unpruned, unpruned]) if before else unpruned

    def fail(self, why: str) -> None:
        """It could not be asked or measured."""
        self.verdict, self.why = Verdict.FAILED, why


class Race:
    """Settings against a target.

    Parameters
    ----------
    settings : sequence of Setting
        All of them; those that are not cheaper than the unpruned model do not take part.
    retain : float
        The target: retained accuracy, in (0, 1].
    units : int
        How many there are to ask.
    """

    def __init__(self, settings: Sequence[Setting], retain: float, units: int) -> None:
        self.retain, self.units = retain, units
        self.standings = [Standing(setting) for setting in sorted(settings, key=lambda s: (s.cost, s.tokens))]
        self.chains: dict[str, list[Standing]] = {}
        for standing in sorted(self.standings, key=lambda s: (-s.setting.tokens, -s.setting.cost)):
            if standing.setting.cost < 1:
                self.chains.setdefault(standing.setting.reducer, []).append(standing)
            else:
                standing.verdict = Verdict.NO_GAIN

    @property
    def alpha(self) -> float:
        """Error probability of each chain."""
        return ERROR / max(len(self.chains), 1)

    @property
    def open(self) -> list[Standing]:
        """Who is asked on, cheapest first."""
        return [standing for standing in self.standings if standing.verdict is Verdict.OPEN and not standing.shown]

    @property
    def best(self) -> Standing | None:
        """The cheapest that is shown to hold the target."""
        return next((standing for standing in self.standings if standing.verdict is Verdict.HOLDS), None)

    def judge(self) -> None:
        """Draw the conclusions from all that has been asked."""
        for chain in self.chains.values():
            passed = True
            for standing in chain:
                if standing.verdict is Verdict.OPEN and standing.units and not standing.shown:
                    self._look(standing)
                if passed and standing.shown:
                    standing.verdict = Verdict.HOLDS
                passed = passed and standing.verdict is Verdict.HOLDS
            self._close_after(chain)
        if self.best is not None:
            for chain in self.chains.values():
                self._close_costlier(chain, self.best.setting.cost)

    def _look(self, standing: Standing) -> None:
        standing.shown = convinced(gains_of(*standing.means, self.retain), self.alpha)
        if standing.shown:
            return
        if convinced(losses_of(*standing.means, self.retain), self.alpha):
            standing.verdict = Verdict.BELOW
        elif self._hopeless(standing):
            standing.verdict = Verdict.HOPELESS

    def bounds(self, standing: Standing) -> Bounds:
        """Between which values the retained accuracy of a setting lies, at the level of its chain."""
        return bounds(*standing.means, self.alpha) if standing.units else Bounds(0.0, math.inf)

    def _hopeless(self, standing: Standing) -> bool:
        """Whether the questions that are left would not do even if it were somewhat better than it looks."""
        gains = gains_of(*standing.means, self.retain)
        luck = _OPTIMISM * gains.std() / math.sqrt(len(gains))
        return projected(gains, self.units - standing.units, luck) < -math.log(self.alpha)

    @staticmethod
    def _close_after(chain: Sequence[Standing]) -> None:
        """What follows one that is out cannot count any more."""
        out = False
        for standing in chain:
            if out and standing.verdict is Verdict.OPEN:
                standing.verdict = Verdict.AFTER
            out = out or standing.verdict in (Verdict.BELOW, Verdict.HOPELESS, Verdict.FAILED)

    @staticmethod
    def _close_costlier(chain: Sequence[Standing], cost: float) -> None:
        """One is of use as long as it, or one that needs it to count, could be cheaper than the best."""
        useful = False
        for standing in reversed(chain):
            undecided = standing.verdict is Verdict.OPEN
            useful = useful or (undecided and standing.setting.cost < cost)
            if undecided and not useful:
                standing.verdict = Verdict.COSTLIER

    def needed(self, standing: Standing) -> int | None:
        """About how many further units would show that a setting holds the target; None if it does not look like it."""
        return further_units(gains_of(*standing.means, self.retain), self.alpha) if standing.units else None

    @property
    def front(self) -> Iterator[Standing]:
        """Who retains more than everybody who is cheaper, by cost; of those that were asked."""
        most = -math.inf
        for standing in self.standings:
            if standing.retained is not None and standing.retained > most:
                most = standing.retained
                yield standing
