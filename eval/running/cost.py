# SPDX-License-Identifier: Apache-2.0
"""Measures the prefill of each cell on the first questions of its task, apart from the accuracy run."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Container, Sequence
from typing import Any

from vtoken.eval.errors import reason
from vtoken.eval.harness.tasksource import load_task
from vtoken.eval.running.runner import POLL, Runner
from vtoken.eval.store.results import BATCH
from vtoken.eval.sweeps.cells import Cell
from vtoken.profile import measure_prefill


def measure_cells(
    cells: Sequence[Cell], runner: Runner, *, batch: int = BATCH, before: Callable[[Cell], None] = lambda cell: None
) -> dict[Cell, str]:
    """Profile the finished cells that have no profile yet.

    Returns
    -------
    dict
        Cells that could not be measured, with the reason; their accuracy stands.
    """
    failed: dict[Cell, str] = {}
    store = runner.store
    left = [cell for cell in cells if store.result(cell.id) is not None]
    while left := [cell for cell in left if store.profile(cell.id) is None and cell not in failed]:
        held_elsewhere = 0
        for cell in left:
            with store.lock(cell.id).attempt() as held:
                if not held:
                    held_elsewhere += 1
                elif store.profile(cell.id) is None:
                    before(cell)
                    if why := _measure(cell, runner, batch):
                        failed[cell] = why
        if held_elsewhere == len(left):
            runner.listener.waiting(left)
            time.sleep(POLL)
    return failed


def _measure(cell: Cell, runner: Runner, batch: int) -> str:
    """Measure and save; returns why that did not work, "" if it did."""
    try:
        model = runner.model(cell)
        found = runner.store.result(cell.id)
        inputs = first_inputs(cell, model, batch, found.left_out if found else ())
        cost = measure_prefill(model.model, cell.reducer, inputs)
    except Exception as error:
        return reason(error)
    runner.store.save_profile(cell.id, cost.as_dict())
    return ""


def first_inputs(cell: Cell, model: Any, batch: int, left_out: Container[int] = ()) -> Any:
    """Encoded prompts of the first documents of a cell's task, but for those that are left out."""
    task = load_task(cell.task.name, cell.model_type, cell.task.folder)
    from lmms_eval.protocol import ChatMessages  # now that it is loaded with care

    numbers = itertools.islice((i for i in range(len(task.eval_docs)) if i not in left_out), batch)
    docs = [task.eval_docs[i] for i in numbers]
    talks = [ChatMessages(messages=task.doc_to_messages(doc)).to_hf_messages() for doc in docs]
    return model.encode(talks)
