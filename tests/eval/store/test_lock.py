# SPDX-License-Identifier: Apache-2.0
"""One holder at a time; the lock of a dead one is free again, that of a living one never is."""

import multiprocessing
import os
import signal
import time

import pytest

from vtoken.eval.store.lock import CellLock, LockLostError

LEASE = 1.5


def try_lock(lock):
    with lock.attempt() as held:
        return held


def hold(path, pipe):
    """Hold a lock until told to look whether it is still held."""
    lock = CellLock(path, LEASE)
    with lock.attempt() as held:
        pipe.send(held)
        pipe.recv()
        try:
            lock.check()
            pipe.send("held")
        except LockLostError:
            pipe.send("lost")


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock ``tmp_path / "lock"``: the process and our end of its pipe."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(tmp_path / "lock", theirs))
    process.start()
    assert ours.recv() is True
    yield process, ours
    process.kill()
    process.join()


def test_one_holder_at_a_time(tmp_path):
    first, second = CellLock(tmp_path / "deep" / "lock"), CellLock(tmp_path / "deep" / "lock")
    with first.attempt() as held:
        assert held
        assert first.holder == os.getpid()
        first.check()
        assert not try_lock(second)
    assert first.holder is None
    assert try_lock(second)


def test_an_error_frees_the_lock(tmp_path):
    lock = CellLock(tmp_path / "lock")
    with pytest.raises(ZeroDivisionError), lock.attempt():
        1 / 0
    assert try_lock(CellLock(tmp_path / "lock"))


def test_the_lock_of_a_killed_process_is_taken_at_once(tmp_path, holder):
    lock = CellLock(tmp_path / "lock", LEASE)
    assert not try_lock(lock)
    os.kill(holder[0].pid, signal.SIGKILL)
    holder[0].join()
    assert try_lock(lock)


def test_a_living_holder_keeps_its_lock_for_longer_than_a_lease(tmp_path, holder):
    lock = CellLock(tmp_path / "lock", LEASE)
    deadline = time.monotonic() + 3 * LEASE
    while time.monotonic() < deadline:
        assert not try_lock(lock)
        time.sleep(0.05)
    holder[1].send("look")
    assert holder[1].recv() == "held"


def test_a_holder_that_stands_still_loses_the_lock_and_hears_of_it(tmp_path, holder):
    """As one on a machine that is gone, whose process cannot be looked up."""
    lock = CellLock(tmp_path / "lock", LEASE)
    os.kill(holder[0].pid, signal.SIGSTOP)
    deadline = time.monotonic() + 10 * LEASE
    refreshed = os.stat(tmp_path / "lock").st_mtime
    while not try_lock(lock):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        refreshed = os.stat(tmp_path / "lock").st_mtime
    assert time.time() - refreshed >= LEASE
    os.kill(holder[0].pid, signal.SIGCONT)
    holder[1].send("look")
    assert holder[1].recv() == "lost"


def test_a_lock_file_without_a_holder_does_not_block_for_ever(tmp_path):
    (tmp_path / "lock").touch()  # killed between creating and writing
    assert not try_lock(CellLock(tmp_path / "lock", LEASE))  # its holder may be about to write it
    time.sleep(2.5)
    assert try_lock(CellLock(tmp_path / "lock", LEASE))
