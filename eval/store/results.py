# SPDX-License-Identifier: Apache-2.0
"""Results on disk: one folder a cell, written so that a crash at any moment leaves old or new, never half.

OUT/cells/<id>/result.json      the cell, its metrics and provenance; its presence means that the cell is finished
OUT/cells/<id>/samples.jsonl    one line per document
OUT/cells/<id>/answers.jsonl    answers so far, while the cell runs; answers-1.jsonl, ... of further processes on it
OUT/cells/<id>/failure.json     the traceback of a cell that raised; the next run tries it again
OUT/cells/<id>/profile.json     measured cost
OUT/locks/<id>                  held by the runner that is at the cell
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vtoken.eval.errors import EvalError
from vtoken.eval.store.lock import CellLock

RESULT, SAMPLES, ANSWERS, FAILURE, PROFILE = (
    "result.json",
    "samples.jsonl",
    "answers.jsonl",
    "failure.json",
    "profile.json",
)


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

    def result(self, cell: str) -> dict[str, Any] | None:
        """The result of a finished cell; None for any other, and for a damaged file."""
        return read_json(self.path(cell, RESULT))

    def failure(self, cell: str) -> dict[str, Any] | None:
        """What a failed cell raised."""
        return read_json(self.path(cell, FAILURE))

    def profile(self, cell: str) -> dict[str, Any] | None:
        """Measured cost of a cell."""
        return read_json(self.path(cell, PROFILE))

    def samples(self, cell: str) -> list[dict[str, Any]]:
        """The documents of a finished cell, in order."""
        return read_samples(self.path(cell, SAMPLES))

    def save(self, cell: str, result: dict[str, Any], samples: Iterable[dict[str, Any]]) -> None:
        """Finish a cell. The result comes last: it vouches for the samples."""
        lines = [json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples]
        write_atomic(self.path(cell, SAMPLES), "".join(lines))
        write_atomic(self.path(cell, RESULT), dump(result))
        self._remove_leftovers(cell)

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

    def save_failure(self, cell: str, failure: dict[str, Any]) -> None:
        """Record what a cell raised."""
        write_atomic(self.path(cell, FAILURE), dump(failure))

    def save_profile(self, cell: str, profile: dict[str, Any]) -> None:
        """Record what a cell costs."""
        write_atomic(self.path(cell, PROFILE), dump(profile))

    def discard(self, cell: str) -> None:
        """Forget a cell."""
        shutil.rmtree(self.root / "cells" / cell, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None if there is none, or a damaged one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The documents of a finished cell, in order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def dump(data: Any) -> str:
    """Readable JSON."""
    return json.dumps(data, indent=1, ensure_ascii=False, default=str) + "\n"


def write_atomic(path: Path, text: str) -> None:
    """Write beside the target, then move into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
