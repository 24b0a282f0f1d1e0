# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C in the middle of ``vtoken compare``: finished cells stay, and the next run goes on."""

import os
import signal
import subprocess
import sys
import time

import pytest

CELLS = 9  # unpruned and 2 x 4


def command(checkpoint, out):
    program = "from vtoken.cli import main; main()"
    options = ["-m", str(checkpoint), "-r", "random,uniform", "-k", "0.5,0.25,0.1,0.05", "--limit", "24"]
    return [sys.executable, "-c", program, "compare", *options, "--batch-size", "8", "--out", str(out)]


def results(out):
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("cells/*/result.json")}


def hear_interrupts():
    """A suite that runs in the background of a shell inherits that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interrupt_loses_no_finished_cell(checkpoint, private_cache, tmp_path):
    out = tmp_path / "out"
    running = subprocess.Popen(command(checkpoint, out), stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts)
    deadline = time.monotonic() + 300
    while len(results(out)) < 2 and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    before = results(out)
    assert running.returncode == 130, errors
    assert f"Stopped: {len(before)} of {CELLS} cells are finished." in errors
    assert 2 <= len(before) < CELLS
    assert "Traceback" not in errors

    done = subprocess.run(command(checkpoint, out), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert f"{len(before)} of {CELLS} cells are there already" in done.stderr
    after = results(out)
    assert len(after) == CELLS
    assert before.items() <= after.items()
