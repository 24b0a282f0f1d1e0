# SPDX-License-Identifier: Apache-2.0
"""Measures the prefill of each cell on the first questions of its task, apart from the accuracy run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vtoken.eval.cells import Cell
from vtoken.eval.runner import Runner, reason
from vtoken.eval.tasksource import load_task
from vtoken.profile import measure_prefill

BATCH = 4  # prompts at once: enough that the arithmetic outweighs the overhead, few enough to be quick


def measure_cells(
    cells: Sequence[Cell], runner: Runner, *, batch: int = BATCH, before: Callable[[Cell], None] = lambda cell: None
) -> dict[Cell, str]:
    """Profile the finished cells that have no profile yet.

    Returns
    -------
    dict
        Cells that could not be measured, with the reason; their accuracy stands.
    """
    failed = {}
    for cell in cells:
        if runner.store.result(cell.id) is None or runner.store.profile(cell.id) is not None:
            continue
        before(cell)
        model = runner.model(cell)
        try:
            cost = measure_prefill(model.model, cell.reducer, first_inputs(cell, model, batch))
        except Exception as error:
            failed[cell] = reason(error)
        else:
            runner.store.save_profile(cell.id, cost.as_dict())
    return failed


def first_inputs(cell: Cell, model: Any, batch: int) -> Any:
    """Encoded prompts of the first documents of a cell's task."""
    from lmms_eval.protocol import ChatMessages

    task = load_task(cell.task.name, cell.model_type)
    docs = [task.eval_docs[i] for i in range(min(batch, len(task.eval_docs)))]
    talks = [ChatMessages(messages=task.doc_to_messages(doc)).to_hf_messages() for doc in docs]
    return model.encode(talks)
