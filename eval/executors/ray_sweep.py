# SPDX-License-Identifier: Apache-2.0
"""The driver of a Ray run: gives cells to workers, replaces workers that are lost, tells one listener everything."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from vtoken.eval.errors import EvalError, reason
from vtoken.eval.executors.ray_worker import Worker, surroundings
from vtoken.eval.model.loading import ModelSpec
from vtoken.eval.running.attempt import Attempt, Status, conclude, failure_of
from vtoken.eval.running.listener import Listener, Outcome
from vtoken.eval.running.runner import POLL
from vtoken.eval.store.results import Store
from vtoken.eval.sweeps.cells import Cell

STILLBORN = 3  # workers in a row that end before they are ready: the cluster is broken


@dataclass(eq=False)
class Hand:
    """The driver's view of a worker."""

    actor: Any
    stream: Any  # of events; None while there is nothing to do
    cell: Cell | None = None
    spec: ModelSpec | None = None  # of the model it has loaded
    ready: bool = False


class RaySweep:
    """One run.

    Parameters
    ----------
    resources : mapping
        ``num_cpus`` and ``num_gpus`` of a worker.
    workers : int
        At most.
    retries : int
        See `RayExecutor`.
    limits : tuple
        ``empty_limit`` and ``skip_broken`` of every `Runner`.
    """

    def __init__(
        self,
        store: Store,
        listener: Listener,
        resources: Mapping[str, float],
        workers: int,
        retries: int,
        limits: tuple[float, int],
    ) -> None:
        self.store, self.listener, self.workers, self.retries = store, listener, workers, retries
        self.root = store.root.resolve()
        self.actor = ray.remote(**resources)(Worker)
        self.limits = limits
        self.hands: list[Hand] = []
        self.left: list[Cell] = []
        self.busy_until: dict[str, float] = {}  # cells of other runners, by when to look at them again
        self.tries: Counter[str] = Counter()
        self.stillborn = 0
        self.outcome = Outcome()

    def run(self, cells: Sequence[Cell]) -> Outcome:
        """Run all cells.

        Raises
        ------
        EvalError
            If nothing can be run: workers are unfit, or the only model cannot be loaded.
        """
        self.outcome.skipped += [cell for cell in cells if self.store.settle(cell.id)]
        self.left = [cell for cell in cells if cell not in self.outcome.skipped]
        self.lonely = len({cell.model for cell in cells}) == 1
        self.expected = surroundings(any(not (c.model.device or c.model.device_map) for c in cells))
        with tempfile.NamedTemporaryFile(dir=self.root, prefix=".driver-") as proof:
            self.proof = Path(proof.name)
            try:
                while self.left or any(hand.cell for hand in self.hands):
                    self._hire()
                    self._assign()
                    self._hear()
            finally:
                for hand in self.hands:
                    ray.kill(hand.actor)
        return self.outcome

    def _hire(self) -> None:
        """As many workers as there is work for; one that the cluster has no room for yet holds no cell."""
        while len(self.hands) < min(self.workers, len(self.left) + sum(bool(hand.cell) for hand in self.hands)):
            actor = self.actor.remote(self.root, *self.limits)
            stream = actor.start.options(num_returns="streaming").remote(self.proof, self.expected)
            self.hands.append(Hand(actor, stream))

    def _assign(self) -> None:
        """A cell for every idle worker, of the model it has loaded if possible."""
        for hand in self.hands:
            if hand.ready and hand.cell is None:
                now = time.monotonic()
                free = [cell for cell in self.left if self.busy_until.get(cell.id, 0) <= now]
                cell = pick(free, hand.spec, [other.spec for other in self.hands])
                if cell is not None:
                    self.left.remove(cell)
                    hand.cell, hand.spec = cell, cell.model
                    hand.stream = hand.actor.run.options(num_returns="streaming").remote(cell)

    def _hear(self) -> None:
        """Handle one event of every worker that has one."""
        streams = {hand.stream: hand for hand in self.hands if hand.stream is not None}
        if not streams:
            self.listener.waiting(self.left)
            time.sleep(POLL)
            return
        ready, _ = ray.wait(list(streams), num_returns=len(streams), timeout=POLL / 4)
        if not ready:
            ready, _ = ray.wait(list(streams), num_returns=1, timeout=POLL)
        for stream in ready:
            hand = streams[stream]
            try:
                name, value = ray.get(next(stream))
            except StopIteration:
                self._stream_ended(hand)
            except ray.exceptions.RayTaskError as error:
                self._raised(hand, error.cause)
            except ray.exceptions.RayError as error:
                self._lost(hand, type(error).__name__)
            else:
                self._handle(hand, name, value)

    def _handle(self, hand: Hand, name: str, value: Any) -> None:
        if name == "ready":
            if value:
                raise EvalError(f"A Ray worker {value}.")
            hand.ready, self.stillborn = True, 0
            return
        cell = hand.cell
        assert cell is not None, "all other events are about the cell that the worker was given"
        if name == "loading":
            self.listener.loading(value)
        elif name == "started":
            self.listener.started(cell)
        elif name == "answered":
            self.listener.answered(cell, value)
        elif name == "ended":
            hand.cell = None
            self._ended(cell, value)

    def _stream_ended(self, hand: Hand) -> None:
        if hand.cell is not None:
            self._lost(hand, "its device or thread failed")
        hand.stream = None

    def _raised(self, hand: Hand, error: Exception) -> None:
        """Not the cell raised but what is around it, such as a reducer whose module the worker cannot import."""
        cell, hand.cell, hand.stream = hand.cell, None, None
        if cell is None:
            raise EvalError(f"A Ray worker cannot start: {reason(error)}")
        self._ended(cell, self._failure(cell, error))

    def _failure(self, cell: Cell, error: Exception) -> Attempt:
        """A failure that no worker has recorded, and that is final."""
        failure = failure_of(error)
        self.store.save_failure(cell.record(failure=failure))
        return Attempt(Status.FAILED, failure=failure, wrong_input=True)

    def _ended(self, cell: Cell, attempt: Attempt) -> None:
        if attempt.unloadable and self.lonely:
            raise EvalError(attempt.unloadable)
        if attempt.status is Status.BUSY:
            self.busy_until[cell.id] = time.monotonic() + POLL
            self.left.append(cell)
        elif (failure := attempt.failure) and not attempt.wrong_input and self._again(cell):
            self.listener.trouble(f"{cell.label} on {cell.task.name} is tried again: {failure.error}")
        else:
            conclude(cell, attempt, self.outcome, self.listener)

    def _lost(self, hand: Hand, why: str) -> None:
        """A worker is gone: its cell goes on in another."""
        self.hands.remove(hand)
        ray.kill(hand.actor)
        cell, hand.cell = hand.cell, None
        self.listener.trouble(f"A Ray worker was lost ({why}).")
        if not hand.ready:
            self.stillborn += 1
            if self.stillborn >= STILLBORN:
                raise EvalError(f"{STILLBORN} Ray workers in a row ended before they were ready ({why}).")
        elif cell is not None and not self._again(cell):
            error = RuntimeError(f"Its Ray worker was lost {self.tries[cell.id]} times ({why}).")
            self._ended(cell, self._failure(cell, error))

    def _again(self, cell: Cell) -> bool:
        """Put a cell back, unless it has been tried often enough."""
        self.tries[cell.id] += 1
        if self.tries[cell.id] > self.retries:
            return False
        self.left.insert(0, cell)
        return True


def pick(cells: Sequence[Cell], loaded: ModelSpec | None, everywhere: Sequence[ModelSpec | None]) -> Cell | None:
    """The next cell for a worker: of its own model, else of one that no worker has, else of the one with most cells."""
    if not cells:
        return None
    own = [cell for cell in cells if cell.model == loaded]
    unloaded = [cell for cell in cells if cell.model not in everywhere]
    if own or unloaded:
        return (own or unloaded)[0]
    most, _ = Counter(cell.model for cell in cells).most_common(1)[0]
    return next(cell for cell in cells if cell.model == most)
