# SPDX-License-Identifier: Apache-2.0
"""The executor ``accelerate``: data parallel inside a cell, over the accelerators of one machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vtoken.eval.errors import DocumentError, EvalError
from vtoken.eval.executors.base import check_count
from vtoken.eval.executors.local import LocalExecutor
from vtoken.eval.executors.team import Team, share
from vtoken.eval.model.loaded import LoadedModel
from vtoken.eval.model.questions import Answer, Question
from vtoken.eval.running.listener import Listener, Outcome
from vtoken.eval.running.runner import Runner
from vtoken.eval.store.results import Store
from vtoken.eval.store.samplelog import SampleLog
from vtoken.eval.sweeps.cells import Cell

if TYPE_CHECKING:
    from vtoken.eval.harness.asked import Answering

WITHOUT_ACCELERATOR = 2  # processes on a machine that has none


@dataclass
class AccelerateExecutor(LocalExecutor):
    """Splits the documents of every cell over processes that it starts itself.

    Every process has a copy of the model and answers whole batches of the one-process run, this one among them, which
    also scores: the result is that of ``local``, to the digit.

    Parameters
    ----------
    processes : int, optional
        By default one per accelerator of this machine, or 2 where there is none.
    """

    processes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.processes is not None:
            check_count("processes", self.processes)

    def run(self, cells: Sequence[Cell], store: Store, listener: Listener) -> Outcome:
        """See `Executor`."""
        for cell in cells:
            if cell.model.device_map is not None:
                raise EvalError(
                    f"device_map={cell.model.device_map!r} spreads {cell.model.pretrained!r} over devices, the "
                    "executor 'accelerate' gives every device a whole model: use the executor 'local'."
                )
        size = self.processes or torch.accelerator.device_count() or WITHOUT_ACCELERATOR
        with Team(store.root, size) as team:
            self._runner = SharingRunner(store, listener, self.empty_limit, self.skip_broken, team=team)
            return self._runner.run(cells)


class SharingRunner(Runner):
    """Answers its share while the team answers the others."""

    def __init__(self, *arguments: Any, team: Team) -> None:
        super().__init__(*arguments)
        self.team = team

    def answering(
        self,
        cell: Cell,
        model: LoadedModel,
        log: SampleLog,
        answered: Callable[[int], None],
        broken: Callable[[DocumentError], None],
    ) -> Answering:
        """See `Runner`."""

        def heard(count: int) -> None:
            answered(count)
            self.team.listen(0, answered, self.listener.trouble)

        def together(questions: Sequence[Question]) -> Sequence[Answer | None]:
            self.team.ask(cell)
            own(share(questions, cell.batch_size, 0, self.team.size))
            while self.team.is_busy:
                self.team.listen(1.0, answered, self.listener.trouble)
            log.read(self.store.answers(cell.id))
            return rest(questions)  # from the log, and what a lost process has not answered

        own = super().answering(cell, model, log, heard, broken)
        rest = super().answering(cell, model, log, lambda count: None, broken)  # the log's have been counted
        return together
