# SPDX-License-Identifier: Apache-2.0
"""Processes that answer shares of one cell's questions, each with a model and a log of its own.

They need nothing of each other but the end, so there is no process group that could hang: the leader waits on pipes,
and answers itself what a lost process has not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vtoken.eval.errors import reason
from vtoken.eval.harness.driver import collect_questions
from vtoken.eval.model.loading import ModelSpec
from vtoken.eval.model.questions import Question, batches
from vtoken.eval.running.runner import Runner
from vtoken.eval.store.results import Store
from vtoken.eval.store.samplelog import SampleLog
from vtoken.eval.sweeps.cells import Cell


class Team:
    """The processes beside the leader.

    Parameters
    ----------
    root : Path
        Of the store.
    size : int
        Processes, the leader among them.
    """

    def __init__(self, root: Path, size: int) -> None:
        self.root, self.size = root, size
        self._all_threads = torch.get_num_threads()
        self._threads = max(1, self._all_threads // size)
        self._helpers: dict[int, _Helper] = {}

    def __enter__(self) -> Team:
        torch.set_num_threads(self._threads)
        return self

    def __exit__(self, *exc: object) -> None:
        torch.set_num_threads(self._all_threads)
        for helper in self._helpers.values():
            helper.end()

    def ask(self, cell: Cell) -> None:
        """Let every helper answer its share; lost ones are replaced."""
        for rank in range(1, self.size):
            if rank not in self._helpers or not self._helpers[rank].process.is_alive():
                self._helpers[rank] = _Helper(self.root, rank, self.size, self._threads)
            self._helpers[rank].ask(cell)

    @property
    def is_busy(self) -> bool:
        """Whether any helper is still answering."""
        return any(helper.busy for helper in self._helpers.values())

    def listen(self, timeout: float, answered: Callable[[int], None], trouble: Callable[[str], None]) -> None:
        """Pass on what helpers have said, after at most ``timeout`` seconds."""
        busy = {helper.pipe: (rank, helper) for rank, helper in self._helpers.items() if helper.busy}
        for pipe in multiprocessing.connection.wait(list(busy), timeout):
            rank, helper = busy[pipe]  # type: ignore[index]
            count, error = helper.hear()
            if count:
                answered(count)
            if error:
                trouble(f"Process {rank + 1} of {self.size} did not answer its share ({error}): the first one does.")


class _Helper:
    """One process, and the leader's end of its pipe."""

    def __init__(self, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_help, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()  # so that its end is the end of the pipe
        self.cell, self.busy = "", False

    def ask(self, cell: Cell) -> None:
        with contextlib.suppress(BrokenPipeError):  # heard as the end of the pipe
            self.pipe.send(cell)
        self.cell, self.busy = cell.id, True

    def hear(self) -> tuple[int, str]:
        """One message: documents answered, or why no more come; (0, "") is the end of the share."""
        try:
            cell, count, error = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            cell, count, error = self.cell, 0, f"it ended with exit code {self.process.exitcode}"
        if cell != self.cell:  # still at a cell that failed here
            return 0, ""
        self.busy = bool(count)
        return count, error

    def end(self) -> None:
        self.pipe.close()
        if self.busy:
            self.process.terminate()
        self.process.join()


def _help(pipe: Any, root: Path, rank: int, size: int, threads: int) -> None:
    """The life of a helper: a share of every cell that the leader names, until the leader is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the leader's to handle
    torch.set_num_threads(threads)
    runner = Runner(Store(root))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            _serve(runner, pipe, pipe.recv(), rank, size)


def _serve(runner: Runner, pipe: Any, cell: Cell, rank: int, size: int) -> None:
    try:
        answer_share(runner, cell, rank, size, lambda count: pipe.send((cell.id, count, "")))
        pipe.send((cell.id, 0, ""))
    except (BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        pipe.send((cell.id, 0, reason(error)))


def answer_share(runner: Runner, cell: Cell, rank: int, size: int, answered: Callable[[int], None]) -> None:
    """Answer a helper's share of a cell into a log of its own; broken documents are for the leader to judge."""
    model = runner.model(dataclasses.replace(cell, model=place(cell.model, rank)))
    task = runner.task(cell)
    path = runner.store.path(cell.id, f"answers-{rank}.jsonl")
    questions = collect_questions(task, limit=cell.limit, seed=cell.seed or 0, output=path.parent)
    with SampleLog(path, beside=runner.store.answers(cell.id)) as log:
        mine = share(questions, cell.batch_size, rank, size)
        model.answer(mine, cell.reducer, log, answered, lambda error: None, batch_size=cell.batch_size)


def share(questions: Sequence[Question], batch_size: int, rank: int, size: int) -> list[Question]:
    """Every ``size``-th batch: in whole batches, since what shares a batch decides the last digits of an answer."""
    mine = list(batches(questions, batch_size))[rank::size]
    return [questions[number] for batch in mine for number in batch]


def place(spec: ModelSpec, rank: int) -> ModelSpec:
    """The model on the device of a rank: the accelerators of this machine in turn, from the leader's on."""
    device = torch.device(spec.target)
    if device.type == "cpu":
        return spec
    index = ((device.index or 0) + rank) % torch.accelerator.device_count()
    return dataclasses.replace(spec, device=f"{device.type}:{index}")
