# SPDX-License-Identifier: Apache-2.0
"""Sweeps in forked children that are killed or compete; runs in a process of its own with one thread and one model."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from vtoken.eval.running.listener import Listener
from vtoken.eval.running.runner import Runner
from vtoken.eval.store.results import Store


class Pipe(Listener):
    """Writes a byte for every batch of answers."""

    def __init__(self, end):
        self.end = end

    def answered(self, cell, count):
        os.write(self.end, b".")


class Diary(Listener):
    """Appends the id of every cell that is begun to a file."""

    def __init__(self, path):
        self.path = path

    def started(self, cell):
        with self.path.open("a") as file:
            file.write(cell.id + "\n")


def fork(work: Callable[[], None]) -> int:
    """Run something in a child that ends with it; returns the child's process id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


def prepared(cells, root: Path) -> Runner:
    """A runner that has its model loaded and has generated once, so that a child begins at once."""
    torch.set_num_threads(1)  # threads would not survive a fork
    tqdm.monitor_interval = 0  # nor would the lock that such a thread holds be freed
    tqdm.set_lock(threading.RLock())  # tqdm's own is shared with children: one that is killed there stops all others
    runner = Runner(Store(root))
    runner.model(cells[0])
    runner.task(cells[0])
    return runner


def kill_often(cells, root: Path, kills: int, seed: int) -> tuple[int, int, int]:
    """Run cells in children that are killed at random moments, until ``kills`` have died; the last one is left alone.

    Returns
    -------
    killed, partial, completed : int
        Kills, how many of them left a cell in its middle, and how often a sweep came to its end before the next kill;
        then it started anew.
    """
    moments, runner = random.Random(seed), prepared(cells, root)
    killed = partial = completed = 0
    while True:
        readable, writable = os.pipe()
        runner.listener = Pipe(writable)
        child = fork(lambda: runner.run(cells) and None)
        os.close(writable)
        if killed < kills:
            for _ in range(moments.randrange(4)):  # so many batches later ...
                os.read(readable, 1)
            time.sleep(moments.uniform(0, 0.2))  # ... somewhere in a batch, in scoring, in writing, in beginning
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(readable)
        if os.WIFSIGNALED(status):
            killed += 1
            partial += any(runner.store.answers(cell.id) for cell in cells)
        elif killed == kills or os.WEXITSTATUS(status):
            return killed, partial, completed
        else:
            completed += 1
            for cell in cells:
                runner.store.discard(cell.id)


def kill_at_every_change(cell, root: Path) -> int:
    """Kill a child before the first rename or removal of a file, another before its second, until one survives.

    Each has a store of its own under ``root``, ``"1"``, ``"2"``, ..., in which a second child runs the same cell.

    Returns
    -------
    int
        Kills.
    """
    runner = prepared([cell], root)
    for moment in itertools.count(1):
        runner.store = Store(root / str(moment))

        def doomed(moment=moment):
            dies_at(moment)
            runner.run([cell])

        _, status = os.waitpid(fork(doomed), 0)
        if not os.WIFSIGNALED(status):
            return moment - 1
        _, status = os.waitpid(fork(lambda: runner.run([cell]) and None), 0)
        assert os.WEXITSTATUS(status) == 0


def dies_at(moment: int) -> None:
    """Let this process be killed before its ``moment``-th rename or removal of a file; there is no way back."""
    changes = itertools.count(1)

    def watch(event, arguments):
        if event in {"os.rename", "os.remove"} and next(changes) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def compete(cells, root: Path) -> list[list[str]]:
    """Two runners on one folder from both ends, the second killed in its first cell and followed by a third.

    Returns
    -------
    list of list of str
        Ids of the cells that each of the three has begun.
    """
    runner = prepared(cells, root)
    diaries = [root / name for name in ("first", "second", "third")]

    def run(diary: Path, order: int) -> int:
        runner.listener = Diary(diary)
        return fork(lambda: runner.run(cells[::order]) and None)

    first, second = run(diaries[0], 1), run(diaries[1], -1)
    while not diaries[1].exists():
        time.sleep(0.01)
    os.kill(second, signal.SIGKILL)
    os.waitpid(second, 0)
    third = run(diaries[2], -1)
    for child in (first, third):
        _, status = os.waitpid(child, 0)
        assert os.WEXITSTATUS(status) == 0
    return [diary.read_text().split() if diary.exists() else [] for diary in diaries]
