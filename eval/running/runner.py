# SPDX-License-Identifier: Apache-2.0
"""Runs cells in this process: one model loaded at a time, finished cells skipped, failures recorded."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vtoken.eval.errors import DocumentError, EvalError
from vtoken.eval.harness.driver import Evaluation, evaluate
from vtoken.eval.harness.scores import flatten, main_metric
from vtoken.eval.harness.tasksource import load_task
from vtoken.eval.model.loaded import LoadedModel
from vtoken.eval.model.loading import ModelSpec
from vtoken.eval.provenance import prompts_digest
from vtoken.eval.running.attempt import Attempt, Status, conclude, failure_of
from vtoken.eval.running.listener import Listener, Outcome
from vtoken.eval.store.lock import CellLock, LockLostError
from vtoken.eval.store.record import Failure, Result
from vtoken.eval.store.results import ANSWERS, Store
from vtoken.eval.store.samplelog import SampleLog
from vtoken.eval.sweeps.cells import Cell

if TYPE_CHECKING:
    from vtoken.eval.harness.asked import Answering

EMPTY_LIMIT = 0.5
POLL = 1.0  # seconds between looks at cells of other runners


class Runner:
    """Runs cells one after the other; several runners may work in one folder.

    Parameters
    ----------
    store : Store
        Where results go and come from.
    listener : Listener, optional
        Told about progress.
    empty_limit : float
        A cell of whose answers a larger share than this is empty fails: a broken model must not look like a bad one.
    skip_broken : int
        How many documents that cannot be read a cell may leave out; with one more it fails.
    """

    def __init__(
        self,
        store: Store,
        listener: Listener | None = None,
        empty_limit: float = EMPTY_LIMIT,
        skip_broken: int = 0,
    ) -> None:
        self.store, self.listener = store, listener or Listener()
        self.empty_limit, self.skip_broken = empty_limit, skip_broken
        self._loaded: tuple[ModelSpec, LoadedModel] | None = None
        self._broken_models: dict[ModelSpec, Exception] = {}
        self._broken_tasks: dict[tuple[str, ...], Exception] = {}

    def run(self, cells: Sequence[Cell]) -> Outcome:
        """Run what is not finished; a cell that raises does not stop the others, cells of other runners come last.

        Raises
        ------
        EvalError
            If there is only one model and it cannot be loaded: then nothing can be run.
        """
        outcome = Outcome(skipped=[cell for cell in cells if self.store.settle(cell.id)])
        left = [cell for cell in cells if cell not in outcome.skipped]
        lonely = len({cell.model for cell in cells}) == 1
        before = {cell.id: self.store.failure(cell.id) for cell in left}
        while left:
            busy = []
            for cell in left:
                attempt = self._failed_elsewhere(cell, before[cell.id]) or self.attempt(cell)
                if attempt.unloadable and lonely:
                    raise EvalError(attempt.unloadable)
                if attempt.status is Status.BUSY:
                    busy.append(cell)
                else:
                    conclude(cell, attempt, outcome, self.listener)
            if len(busy) == len(left):
                self.listener.waiting(busy)
                time.sleep(POLL)
            left = busy
        return outcome

    def _failed_elsewhere(self, cell: Cell, before: Failure | None) -> Attempt | None:
        """Whether another runner saw the cell fail since this one began: then it need not be tried again."""
        failure = self.store.failure(cell.id)
        return Attempt(Status.FAILED, failure=failure) if failure and failure != before else None

    def attempt(self, cell: Cell) -> Attempt:
        """Try one cell, without waiting for other runners and without retries."""
        if self.store.settle(cell.id):
            return Attempt(Status.SKIPPED)
        lock = self.store.lock(cell.id)
        with lock.attempt() as held:
            if not held:
                return Attempt(Status.BUSY)
            if self.store.result(cell.id) is not None:  # finished between the look and the lock
                return Attempt(Status.SKIPPED)
            return self._locked_attempt(cell, lock)

    def _locked_attempt(self, cell: Cell, lock: CellLock) -> Attempt:
        model = None
        try:
            model = self.model(cell)
            self.listener.started(cell)
            return Attempt(Status.FINISHED, result=self._run_cell(cell, model, lock.check))
        except LockLostError:
            return Attempt(Status.BUSY)
        except Exception as error:
            failure = failure_of(error)
            self.store.save_failure(cell.record(failure=failure))
            wrong = isinstance(error, EvalError)
            unloadable = str(error) if wrong and model is None else ""
            return Attempt(Status.FAILED, failure=failure, unloadable=unloadable, wrong_input=wrong)

    def model(self, cell: Cell) -> LoadedModel:
        """The loaded model of a cell; only one is held at a time, one that fails is not tried again."""
        if cell.model in self._broken_models:
            raise self._broken_models[cell.model]
        if self._loaded is None or self._loaded[0] != cell.model:
            self._loaded = None  # frees the former one first
            self.listener.loading(cell.model)
            try:
                self._loaded = (cell.model, LoadedModel(cell.model))
            except Exception as error:
                self._broken_models[cell.model] = error
                raise
        return self._loaded[1]

    def task(self, cell: Cell) -> Any:
        """The task of a cell; one that cannot be loaded is not tried again, since lmms-eval takes 20 s to give up."""
        key = cell.task.name, cell.model_type, cell.task.folder
        if key in self._broken_tasks:
            raise self._broken_tasks[key]
        try:
            return load_task(*key)
        except Exception as error:
            self._broken_tasks[key] = error
            raise

    def _run_cell(self, cell: Cell, model: LoadedModel, check_lock: Callable[[], None]) -> Result:
        task = self.task(cell)
        started = time.perf_counter()

        def answered(count: int) -> None:
            check_lock()
            self.listener.answered(cell, count)

        log = SampleLog(self.store.path(cell.id, ANSWERS), beside=self.store.answers(cell.id))
        left_out: dict[int, str] = {}

        def broken(error: DocumentError) -> None:
            left_out.update(dict.fromkeys(error.documents, str(error)))
            if len(left_out) > self.skip_broken:
                raise error

        with log:
            answering = self.answering(cell, model, log, answered, broken)
            folder = self.store.path(cell.id, "")
            found = evaluate(answering, task, limit=cell.limit, seed=cell.seed or 0, output=folder)
        seconds = time.perf_counter() - started
        result, samples = self._result(task, found, left_out=left_out, seconds=seconds)
        check_lock()
        self.store.save(cell.record(result), samples)
        return result

    def _result(self, task: Any, found: Evaluation, **noted: Any) -> tuple[Result, list[dict[str, Any]]]:
        metric = main_metric(found.samples[0], task)
        samples = [
            flatten(
                sample,
                metric if metric in sample else main_metric(sample, task),  # mme logs one of two
                found.answers[sample["doc_id"]],
            )
            for sample in found.samples
        ]
        empty = sum(not sample["answer"].strip() for sample in samples)
        self._check_empty(empty, len(samples))
        result = Result(
            metric=metric,
            metrics={name: value for name, value in found.metrics.items() if isinstance(value, (int, float))},
            documents=len(samples),
            empty_answers=empty,
            prompts=prompts_digest(samples),
            dataset=str(getattr(task.eval_docs, "_fingerprint", "")),
            **noted,
        )
        return result, samples

    def answering(
        self,
        cell: Cell,
        model: LoadedModel,
        log: SampleLog,
        answered: Callable[[int], None],
        broken: Callable[[DocumentError], None],
    ) -> Answering:
        """How the questions of a cell are answered; overridden where other processes help."""
        return functools.partial(
            model.answer,
            reducer=cell.reducer,
            log=log,
            on_answers=answered,
            on_broken=broken,
            batch_size=cell.batch_size,
        )

    def _check_empty(self, empty: int, documents: int) -> None:
        if empty > self.empty_limit * documents:
            raise EvalError(
                f"{empty} of {documents} answers are empty, more than empty_limit={self.empty_limit:g} allows: "
                "the reducer or the model is broken, or the task expects it and needs a higher limit."
            )
