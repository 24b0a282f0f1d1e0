# SPDX-License-Identifier: Apache-2.0
"""What it costs to start: processes that import vtoken next to one that imports transformers and a model class, and the
light commands; writes benchmarks/results/startup.json.

Whole processes, interpreter included, in turn, from a warm file cache (each has run before). Wall time is what a user
waits; processor time depends less on what else the machine does. The import that all others are compared with stands
twice in the list: where these two differ much, or a spread is wide, the result is called noisy.

    python benchmarks/startup.py
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from dataclasses import asdict
from statistics import median
from typing import Any

from harness import arguments, save

from vtoken.profile import Spread
from vtoken.profile.spread import alternate

MODEL = "from transformers import LlavaForConditionalGeneration"
BASE, AGAIN = "transformers", "transformers, again"
IMPORTS = {
    BASE: MODEL,
    AGAIN: MODEL,
    "vtoken": "import vtoken",
    "vtoken and transformers": f"import vtoken; {MODEL}",
    "vtoken, ready to wrap": f"import vtoken; {MODEL}; vtoken.wrap, vtoken.IDPruner",
    "vtoken, all names": f"{MODEL}; from vtoken import *",
}
COMMANDS = ("--help", "list", "tasks", "compare --help")
TARGETS = {"added_seconds": 0.3, "command_seconds": 0.5}
NOISY = 0.2
"""Share of the median: a wider interquartile range says more about the machine than about the code."""


def processes(quick: bool) -> dict[str, list[str]]:
    """Name -> command line."""
    imports = {name: code for name, code in IMPORTS.items() if not quick or name == "vtoken"}
    commands = () if quick else COMMANDS
    main = "from vtoken.cli import main; main()"
    return {
        **{name: [sys.executable, "-c", code] for name, code in imports.items()},
        **{f"vtoken {text}": [sys.executable, "-c", main, *text.split()] for text in commands},
    }


def run(command: list[str]) -> tuple[float, float]:
    """Wall and processor seconds of a process.

    Raises
    ------
    subprocess.CalledProcessError
        If it fails.
    """
    before, start = os.times(), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, spent


def measure(commands: dict[str, list[str]], rounds: int) -> dict[str, Any]:
    """Wall and processor seconds of each, what imports take beyond the first, and which of them are noisy."""
    found = alternate({name: functools.partial(run, command) for name, command in commands.items()}, rounds)
    seconds = {
        name: {
            "wall": asdict(Spread.of([wall for wall, _ in times])),
            "cpu": asdict(Spread.of([cpu for _, cpu in times])),
        }
        for name, times in found.items()
    }
    added = {
        name: {"wall": _more(found, name, 0), "cpu": _more(found, name, 1)}
        for name in found
        if name in IMPORTS and name != BASE and BASE in found
    }
    noisy = [name for name, each in seconds.items() if each["wall"]["iqr"] > NOISY * each["wall"]["median"]]
    if added and abs(added[AGAIN]["wall"]) > TARGETS["added_seconds"] / 2:
        noisy.append("added")
    return {"seconds": seconds, "added": added, "noisy": noisy, "targets": TARGETS}


def _more(found: dict[str, list[tuple[float, float]]], name: str, clock: int) -> float:
    """Seconds beyond the import that all are compared with: the median over the rounds."""
    return median(mine[clock] - plain[clock] for mine, plain in zip(found[name], found[BASE], strict=True))


def main() -> None:
    """Measure imports and commands in turn."""
    args = arguments(__doc__, rounds=15)
    results = measure(processes(args.quick), args.rounds)
    for name, each in results["seconds"].items():
        wall, cpu = (Spread(**each[clock]) for clock in ("wall", "cpu"))
        noisy = ", noisy" if name in results["noisy"] else ""
        print(f"{name:24} {wall} s, processor {cpu} s{noisy}", flush=True)
    for name, more in results["added"].items():
        noisy = ", noisy" if "added" in results["noisy"] else ""
        print(f"{name:24} {more['wall']:+.3f} s, processor {more['cpu']:+.3f} s{noisy}", flush=True)
    save("startup", results, args)


if __name__ == "__main__":
    main()
