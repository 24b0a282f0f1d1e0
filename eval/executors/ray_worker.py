# SPDX-License-Identifier: Apache-2.0
"""What runs in a Ray worker: cells one after the other, told as streams of events."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vtoken.eval.model.loading import ModelSpec
from vtoken.eval.provenance import versions
from vtoken.eval.running.attempt import Status
from vtoken.eval.running.listener import Listener
from vtoken.eval.running.runner import Runner
from vtoken.eval.store.results import Store
from vtoken.eval.sweeps.cells import Cell

Event = tuple[str, Any]
"""``("loading", spec)``, ``("started", None)``, ``("answered", count)`` and, last, ``("ended", attempt)``."""


class Worker:
    """A process that keeps its model loaded; the class of a Ray actor.

    Parameters
    ----------
    root : Path
        Results folder, which the driver sees too.
    empty_limit, skip_broken : float, int
        See `Runner`.
    """

    def __init__(self, root: Path, empty_limit: float, skip_broken: int) -> None:
        self.root, self.empty_limit, self.skip_broken = root, empty_limit, skip_broken
        self.runner: Runner | None = None

    def start(self, proof: Path, expected: Mapping[str, str]) -> Iterator[Event]:
        """Compare with the driver; ``("ready", "")``, or with what is wrong.

        Parameters
        ----------
        proof : Path
            A file that the driver has put into the results folder.
        expected : mapping
            `surroundings` of the driver.
        """
        found = surroundings("device" in expected)
        if not proof.exists():
            yield "ready", f"does not see the results folder {str(self.root)!r}: choose one that all nodes share"
        elif strange := sorted(name for name in expected if expected[name] != found[name]):
            name = strange[0]
            advice = "name the device of every model" if name == "device" else "install the same on all nodes"
            yield "ready", f"has {name} {found[name]!r} where the driver has {expected[name]!r}: {advice}"
        else:
            self.runner = Runner(Store(self.root), None, self.empty_limit, self.skip_broken)
            yield "ready", ""

    def run(self, cell: Cell) -> Iterator[Event]:
        """Try a cell; a stream without an end means that this process is of no more use."""
        events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        threading.Thread(target=self._attempt, args=(cell, events)).start()
        while (event := events.get()) is not None:
            yield event

    def _attempt(self, cell: Cell, events: queue.SimpleQueue[Event | None]) -> None:
        assert self.runner is not None, "the driver sends cells to workers that are ready"
        try:
            self.runner.listener = _Sender(events)
            attempt = self.runner.attempt(cell)
            if attempt.status is Status.FAILED and torch.accelerator.is_available():
                torch.accelerator.synchronize()  # raises if the failure has left the device unusable
            events.put(("ended", attempt))
        finally:
            events.put(None)


def surroundings(with_device: bool) -> dict[str, str]:
    """What has to be the same everywhere, since it decides the ids of cells."""
    if not with_device:
        return versions()
    from accelerate import PartialState

    return {**versions(), "device": PartialState().device.type}


class _Sender(Listener):
    """Puts what a runner tells into a queue."""

    def __init__(self, events: queue.SimpleQueue[Event | None]) -> None:
        self.events = events

    def loading(self, spec: ModelSpec) -> None:
        self.events.put(("loading", spec))

    def started(self, cell: Cell) -> None:
        self.events.put(("started", None))

    def answered(self, cell: Cell, count: int) -> None:
        self.events.put(("answered", count))
