# SPDX-License-Identifier: Apache-2.0
"""Runs cells in this process: models loaded once, finished cells skipped, failures recorded, the rest goes on."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vtoken.eval.cells import Cell
from vtoken.eval.harness import evaluate, load_harness
from vtoken.eval.loading import ModelSpec
from vtoken.eval.provenance import surroundings
from vtoken.eval.samplelog import SampleLog
from vtoken.eval.scores import flatten, main_metric
from vtoken.eval.store import ANSWERS, Store
from vtoken.eval.tasksource import load_task


class Listener:
    """Told what happens; override what is of interest."""

    def loading(self, spec: ModelSpec) -> None:
        """A model is being loaded."""

    def started(self, cell: Cell) -> None:
        """A cell begins."""

    def answered(self, cell: Cell, count: int) -> None:
        """``count`` more documents are answered."""

    def finished(self, cell: Cell, result: dict[str, Any]) -> None:
        """A cell is saved."""

    def failed(self, cell: Cell, failure: dict[str, Any]) -> None:
        """A cell raised."""


@dataclass
class Outcome:
    """Cells that were run, that were there already, and that raised."""

    finished: list[Cell] = field(default_factory=list)
    skipped: list[Cell] = field(default_factory=list)
    failed: list[Cell] = field(default_factory=list)


class Runner:
    """Runs cells one after the other.

    Parameters
    ----------
    store : Store
        Where results go and come from.
    listener : Listener, optional
        Told about progress.
    """

    def __init__(self, store: Store, listener: Listener | None = None) -> None:
        self.store, self.listener = store, listener or Listener()
        self._loaded: tuple[ModelSpec, Any] | None = None
        self._broken_tasks: dict[tuple[str, str], Exception] = {}

    def run(self, cells: Sequence[Cell]) -> Outcome:
        """Run what is not finished; a cell that raises does not stop the others.

        Raises
        ------
        EvalError
            If a model cannot be loaded.
        """
        outcome = Outcome()
        for cell in cells:
            if self.store.result(cell.id) is not None:
                outcome.skipped.append(cell)
                continue
            model = self.model(cell)
            self.listener.started(cell)
            try:
                result = self._run_cell(cell, model)
            except Exception as error:
                failure = {"cell": cell.config(), "error": reason(error), "traceback": traceback.format_exc()}
                self.store.save_failure(cell.id, failure)
                outcome.failed.append(cell)
                self.listener.failed(cell, failure)
            else:
                outcome.finished.append(cell)
                self.listener.finished(cell, result)
        return outcome

    def model(self, cell: Cell) -> Any:
        """The loaded model of a cell, unpruned; only one model is held at a time."""
        load_harness()
        from vtoken.eval.model import ReducedModel

        if self._loaded is None or self._loaded[0] != cell.model:
            self._loaded = None  # frees the former one first
            self.listener.loading(cell.model)
            self._loaded = (cell.model, ReducedModel(cell.model))
        model = self._loaded[1]
        model.batch_size = cell.batch_size
        model.use(None)
        return model

    def _task(self, cell: Cell) -> Any:
        """The task of a cell; one that cannot be loaded is not tried again, since lmms-eval takes 20 s to give up."""
        key = cell.task.name, cell.model_type
        if key in self._broken_tasks:
            raise self._broken_tasks[key]
        try:
            return load_task(*key)
        except Exception as error:
            self._broken_tasks[key] = error
            raise

    def _run_cell(self, cell: Cell, model: Any) -> dict[str, Any]:
        task = self._task(cell)
        started = time.perf_counter()
        with SampleLog(self.store.path(cell.id, ANSWERS)) as log:
            model.log, model.on_answers = log, lambda count: self.listener.answered(cell, count)
            try:
                model.use(cell.reducer)
                folder = self.store.path(cell.id, "")
                found = evaluate(model, task, limit=cell.limit, seed=cell.seed, output=folder)
            finally:
                model.log, model.on_answers = None, lambda count: None
                model.use(None)
        metric = main_metric(found.samples[0], task)
        samples = [flatten(sample, metric) for sample in found.samples]
        result = {
            "id": cell.id,
            "cell": cell.config(),
            "metric": metric,
            "metrics": {name: value for name, value in found.metrics.items() if isinstance(value, (int, float))},
            "documents": len(samples),
            "empty_answers": sum(not sample["answer"] for sample in samples),
            "seconds": time.perf_counter() - started,
            "dataset": str(getattr(task.eval_docs, "_fingerprint", "")),
            "made_with": surroundings(),
        }
        self.store.save(cell.id, result, samples)
        return result


def reason(error: BaseException) -> str:
    """What went wrong; lmms-eval wraps errors of datasets and scoring into a `tenacity.RetryError`."""
    attempt = getattr(error, "last_attempt", None)
    inner = attempt.exception() if attempt is not None else None
    return str(inner or error) or type(inner or error).__name__
