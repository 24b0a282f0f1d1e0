# SPDX-License-Identifier: Apache-2.0
"""Made-up results: what a sweep leaves on disk, without running a model."""

from __future__ import annotations

import json

import numpy as np

from vtoken.eval.comparison.runs import Run
from vtoken.eval.comparison.summary import summarize
from vtoken.eval.store.record import CellRecord, Result
from vtoken.eval.store.results import Store
from vtoken.eval.sweeps.cells import Cell

KINDS = ("color", "digit")


def save_run(store: Store, cell: Cell, rate: float, *, count: int = 200, first: int = 0, answer: str = "x") -> None:
    """A finished cell that is right on a share ``rate`` of documents ``first`` to ``first + count``.

    Documents are as hard in every cell: what a lower rate gets right, a higher one does too.
    """
    ease = np.random.default_rng(0).uniform(size=first + count)
    kept = 144 if cell.reducer is None else 36
    tokens = {"visual_tokens": 144, "visual_kept": kept, "visual_per_layer": float(kept)}
    samples = [
        {"doc_id": i, "kind": KINDS[i % 2], "cluster": str(i // 4), "prompt": "", "target": f"t{i}", "tokens": tokens}
        | {"score": float(ease[i] < rate), "answer": f"t{i}" if ease[i] < rate else answer}
        for i in range(first, first + count)
    ]
    made = {"vtoken": "0.1.0", "torch": "2.15", "gpu": None}
    result = Result(metric="exact_match", documents=count, dataset="d1", prompts="p1")
    store.save(cell.record(result).model_copy(update={"made_with": made}), samples)
    store.save_profile(cell.id, {"prefill_ms": 12.5, "speedup": 2.0, "kv_bytes": 150_000.0})


def made_up_run(label, samples, *, model="m", task="t", keep=0.5) -> Run:
    """A run of a reducer that need not exist."""
    reducer = None if label == "unpruned" else {"reducer": label, "keep": keep}
    cell = {"model": {"pretrained": model}, "task": {"name": task}, "reducer": reducer}
    return Run(CellRecord(id=f"{label}{task}", cell=cell, label=label, result=Result()), samples)


def save_table(store: Store, cells: list[Cell]) -> None:
    """The ``results.json`` of these cells."""
    rows = [{"cell": row.cell} for row in summarize(cells, store)]
    (store.root / "results.json").write_text(json.dumps({"settings": {"limit": 200}, "rows": rows}))
