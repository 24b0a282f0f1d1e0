# SPDX-License-Identifier: Apache-2.0
"""One lock per cell, so that several runners share a results folder, on one machine or over a network file system.

A lock is a file that its holder refreshes. That works where `flock` does not (NFS, Lustre), and says who died: on the
holder's own machine its process is looked up, from elsewhere a lock that is not refreshed for `LEASE` seconds is taken.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import SoftFileLease, Timeout

LEASE = 120.0  # seconds; longer than Python threads stand still while a large model is loaded
HEARTBEATS = 6  # refreshes per lease


class LockLostError(RuntimeError):
    """Another runner took the lock: this one stood still for longer than the lease."""


class CellLock:
    """The lock of one cell.

    Parameters
    ----------
    path : Path
        The lock file; its folder is created.
    lease : float
        Seconds without a refresh after which a holder on another machine counts as dead. The same for all runners.
    """

    def __init__(self, path: Path, lease: float = LEASE) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = SoftFileLease(path, lease_duration=lease, heartbeat_interval=lease / HEARTBEATS)

    @contextlib.contextmanager
    def attempt(self) -> Iterator[bool]:
        """Hold the lock if it is free or its holder is dead; says whether it does, never waits."""
        if not (self._acquire() or self._acquire()):  # the first may only have removed the file of a dead holder
            yield False
            return
        try:
            yield True
        finally:
            self._file.release()

    def _acquire(self) -> bool:
        try:
            self._file.acquire(blocking=False)
        except Timeout:
            return False
        return True

    @property
    def exists(self) -> bool:
        """Whether it is held, or was by a runner that died."""
        return self._path.exists()

    @property
    def holder(self) -> int | None:
        """Process id of the holder, on whatever machine that is; None if the lock is free."""
        return self._file.pid

    def check(self) -> None:
        """Make sure that the lock is still held.

        Raises
        ------
        LockLostError
            If another runner took it.
        """
        if self._file.compromise is not None or not self._file.is_lock_held_by_us:
            raise LockLostError(f"The lock {self._path} was taken by another runner.")
