# SPDX-License-Identifier: Apache-2.0
"""What all benchmarks share: arguments, alternating runs, and a JSON file that says where the numbers come from."""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vtoken.eval.provenance import surroundings
from vtoken.profile import Spread
from vtoken.profile.clock import device_now
from vtoken.profile.spread import alternate

RESULTS = Path(__file__).parent / "results"


def arguments(description: str | None, flags: Sequence[str] = (), **defaults: Any) -> argparse.Namespace:
    """``--quick``, ``--device``, ``--threads``, ``--rounds``, ``--out`` and further flags, with other defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="minimal sizes: does it run?")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=5, help="alternating runs that count")
    parser.add_argument("--out", type=Path, default=None, help="JSON file; benchmarks/results/NAME.json by default")
    for flag in flags:
        parser.add_argument(f"--{flag}", action="store_true")
    parser.set_defaults(**defaults)
    found = parser.parse_args()
    torch.set_num_threads(found.threads)
    return found


def race(runs: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu") -> dict[str, Any]:
    """Milliseconds of several functions in turn, and how much faster than the first one each is; see `summary`."""
    return summary(round_times(runs, rounds, device))


def race_around(
    runs: Mapping[str, Callable[[], Any]],
    around: Mapping[str, Callable[[], AbstractContextManager]],
    rounds: int,
    device: str = "cpu",
) -> dict[str, Any]:
    """`race` in which some functions run in a context; entering and leaving it is not timed."""
    return summary(round_times(runs, rounds, device, around=around))


def round_times(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: str = "cpu",
    warmup: int = 1,
    around: Mapping[str, Callable[[], AbstractContextManager]] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of several functions in turn, round by round.

    Parameters
    ----------
    around : mapping, optional
        Contexts that some of them run in; entering and leaving is not timed.
    """
    target = torch.device(device)

    def timed(name: str) -> float:
        with (around or {}).get(name, nullcontext)():
            start = device_now(target)
            runs[name]()
            return (device_now(target) - start) * 1e3

    return alternate({name: partial(timed, name) for name in runs}, rounds, warmup)


def summary(found: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Per name ``median``, ``iqr`` and ``speedup``: the median over the rounds of first / this."""
    first = next(iter(found.values()))
    return {
        name: {**asdict(Spread.of(times)), "speedup": median(a / b for a, b in zip(first, times, strict=True))}
        for name, times in found.items()
    }


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return float(torch.tensor(values, dtype=torch.double).log().mean().exp())


def cpu_name() -> str:
    """What the machine calls its processor."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def save(name: str, results: Any, args: argparse.Namespace) -> Path | None:
    """Write the results; a quick run writes only where ``--out`` says."""
    path = args.out or (None if args.quick else RESULTS / f"{name}.json")
    if path is not None:
        report = {"benchmark": name, "results": results, "surroundings": {**surroundings(), "cpu": cpu_name()}}
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path}", flush=True)
    return path
