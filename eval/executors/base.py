# SPDX-License-Identifier: Apache-2.0
"""What every executor offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from vtoken.eval.errors import EvalError
from vtoken.eval.running.listener import Listener, Outcome
from vtoken.eval.running.runner import EMPTY_LIMIT
from vtoken.eval.store.results import Store
from vtoken.eval.sweeps.cells import Cell


@dataclass
class Executor(ABC):
    """Runs cells; its fields are its options.

    Parameters
    ----------
    empty_limit : float
        Share of empty answers above which a cell fails, see `vtoken.eval.running.runner.Runner`.
    skip_broken : int
        Documents that cannot be read which a cell may leave out.
    """

    measures: ClassVar[bool] = True
    """Whether `measure` does anything."""

    empty_limit: float = EMPTY_LIMIT
    skip_broken: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.empty_limit, (int, float)) or not 0 <= self.empty_limit <= 1:
            raise EvalError(f"empty_limit={self.empty_limit!r} is not possible: give a share from 0 to 1.")
        check_count("skip_broken", self.skip_broken, 0)

    @abstractmethod
    def run(self, cells: Sequence[Cell], store: Store, listener: Listener) -> Outcome:
        """Run what is not finished; failures are recorded and stop nothing.

        Raises
        ------
        EvalError
            If nothing can be run.
        """

    def measure(self, cells: Sequence[Cell], store: Store, before: Callable[[Cell], None]) -> dict[Cell, str]:
        """Measure the cost of finished cells on this machine, `before` each of them.

        Returns
        -------
        dict
            Cells that could not be measured, with the reason.
        """
        return {}


def check_count(name: str, value: object, least: int = 1) -> None:
    """Check an option that counts.

    Raises
    ------
    EvalError
        If it is no whole number, or too small.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise EvalError(f"{name}={value!r} is not possible: give a whole number from {least} on.")
