# SPDX-License-Identifier: Apache-2.0
"""Results on disk: one folder a cell, written so that a crash at any moment leaves old or new, never half.

OUT/cells/<id>/result.json      the record of a cell that is finished, see `vtoken.eval.store.record`
OUT/cells/<id>/samples.jsonl    one line per document
OUT/cells/<id>/answers.jsonl    answers so far, while the cell runs; answers-1.jsonl, ... of further processes on it
OUT/cells/<id>/failure.json     the record of a cell that raised, with its traceback; the next run tries it again
OUT/cells/<id>/profile.json     measured cost
OUT/locks/<id>                  held by the runner that is at the cell
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vtoken.eval.errors import EvalError
from vtoken.eval.store.files import dump, read_json, write_atomic
from vtoken.eval.store.lock import CellLock
from vtoken.eval.store.record import FAILURE, RESULT, CellRecord, Failure, Result, read_samples

ANSWERS, PROFILE = "answers.jsonl", "profile.json"
BATCH = 4  # prompts of a profile: enough that the arithmetic outweighs the overhead, few enough to be quick


class Store:
    """Results of cells under one folder.

    Parameters
    ----------
    root : path
        Created if it does not exist.

    Raises
    ------
    EvalError
        If it cannot be written.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        try:
            (self.root / "cells").mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise EvalError(
                f"The results folder {str(self.root)!r} cannot be written ({why}): choose another."
            ) from None

    def path(self, cell: str, name: str) -> Path:
        """A file of a cell."""
        return self.root / "cells" / cell / name

    def answers(self, cell: str) -> list[Path]:
        """The logs of all processes that have worked on a cell that is not finished."""
        return sorted(self.path(cell, "").glob(f"{Path(ANSWERS).stem}*.jsonl"))

    def lock(self, cell: str) -> CellLock:
        """The lock of a cell: hold it to write its results."""
        return CellLock(self.root / "locks" / cell)

    def record(self, cell: str) -> CellRecord | None:
        """The record of a finished or failed cell; None for any other, and for a damaged file."""
        return CellRecord.read(self.path(cell, ""))

    def records(self) -> Iterator[CellRecord]:
        """The records of all finished cells."""
        for path in self.root.glob(f"cells/*/{RESULT}"):
            if (found := CellRecord.read_file(path)) is not None:
                yield found

    def result(self, cell: str) -> Result | None:
        """The result of a finished cell; None for any other, and for a damaged file."""
        found = CellRecord.read_file(self.path(cell, RESULT))
        return found.result if found else None

    def failure(self, cell: str) -> Failure | None:
        """What a failed cell raised."""
        found = CellRecord.read_file(self.path(cell, FAILURE))
        return found.failure if found else None

    def profile(self, cell: str) -> dict[str, Any] | None:
        """Measured cost of a cell."""
        return read_json(self.path(cell, PROFILE))

    def samples(self, cell: str) -> list[dict[str, Any]]:
        """The documents of a finished cell, in order."""
        return read_samples(self.path(cell, ""))

    def save(self, record: CellRecord, samples: Iterable[Mapping[str, Any]]) -> None:
        """Finish a cell."""
        record.write(self.path(record.id, ""), samples)
        self._remove_leftovers(record.id)

    def settle(self, cell: str) -> bool:
        """Whether a cell is finished; then what a runner that died right after that has left behind is removed."""
        if self.result(cell) is None:
            return False
        lock = self.lock(cell)
        if lock.exists or self._leftovers(cell):
            with lock.attempt() as held:
                if held:  # a living runner removes its own
                    self._remove_leftovers(cell)
        return True

    def _leftovers(self, cell: str) -> list[Path]:
        """What a finished cell no longer needs."""
        failure = self.path(cell, FAILURE)
        halves = self.path(cell, "").glob(".*.part")
        return [*self.answers(cell), *halves, *([failure] if failure.exists() else [])]

    def _remove_leftovers(self, cell: str) -> None:
        for path in self._leftovers(cell):
            path.unlink(missing_ok=True)

    def save_failure(self, record: CellRecord) -> None:
        """Record how a cell failed."""
        record.write(self.path(record.id, ""))

    def save_profile(self, cell: str, profile: dict[str, Any]) -> None:
        """Record what a cell costs."""
        write_atomic(self.path(cell, PROFILE), dump(profile))

    def discard(self, cell: str) -> None:
        """Forget a cell."""
        shutil.rmtree(self.root / "cells" / cell, ignore_errors=True)
