# SPDX-License-Identifier: Apache-2.0
"""The executor ``local``: one cell after the other in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vtoken.eval.executors.base import Executor
from vtoken.eval.running.listener import Listener, Outcome
from vtoken.eval.running.runner import Runner
from vtoken.eval.store.results import Store
from vtoken.eval.sweeps.cells import Cell


@dataclass
class LocalExecutor(Executor):
    """Runs and measures with one model loaded at a time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._runner: Runner | None = None

    def run(self, cells: Sequence[Cell], store: Store, listener: Listener) -> Outcome:
        """See `Executor`."""
        self._runner = Runner(store, listener, self.empty_limit, self.skip_broken)
        return self._runner.run(cells)

    def measure(self, cells: Sequence[Cell], store: Store, before: Callable[[Cell], None]) -> dict[Cell, str]:
        """See `Executor`; goes on with the model that the run left loaded."""
        from vtoken.eval.running.cost import measure_cells

        runner = self._runner or Runner(store, empty_limit=self.empty_limit)
        return measure_cells(cells, runner, before=before)
