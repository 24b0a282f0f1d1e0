# SPDX-License-Identifier: Apache-2.0
"""An append-only log of answers: what makes a cell resume in its middle after a crash."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class SampleLog:
    """Answers by key, one JSON line each.

    A killed process leaves at most one torn line at the end; it is cut off when the log is opened again.

    Parameters
    ----------
    path : Path
        The file; created if it does not exist.
    beside : iterable of Path
        Logs of other processes on the same cell, see `read`.
    """

    def __init__(self, path: Path, beside: Iterable[Path] = ()) -> None:
        self._answers: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.read(other for other in beside if other != path)
        good = self._read(path) if path.exists() else 0
        self._file = path.open("ab")
        self._file.truncate(good)

    def read(self, paths: Iterable[Path]) -> None:
        """Take over the answers of other logs, which their owners may be writing to."""
        for path in paths:
            self._read(path)

    def _read(self, path: Path) -> int:
        """Load the intact lines; returns where they end."""
        good = 0
        with path.open("rb") as file:
            for line in file:
                try:
                    record = json.loads(line)
                    key = record.pop("key")
                except (ValueError, KeyError, TypeError, AttributeError):
                    break
                if not line.endswith(b"\n"):
                    break
                self._answers[key] = record
                good += len(line)
        return good

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer logged under a key."""
        return self._answers.get(key)

    def add(self, answers: Mapping[str, dict[str, Any]]) -> None:
        """Append answers and make sure that they are on the disk."""
        lines = [json.dumps({"key": key, **answer}) + "\n" for key, answer in answers.items()]
        self._file.write("".join(lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._answers.update(answers)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> SampleLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
