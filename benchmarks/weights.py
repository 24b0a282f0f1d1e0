# SPDX-License-Identifier: Apache-2.0
"""Which weights of an embedded model are measured: those that the package ships, or those of another training."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vtoken.mini import loader

RESULTS = Path(__file__).parent / "results"
AGAIN = "_again"  # at the end of the name of what other weights than the shipped ones gave


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--weights`` and ``--out``."""
    parser.add_argument("--weights", type=Path, help="the export folder of a training, instead of the shipped weights")
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/MODEL.json, or MODEL_again.json")


def load(name: str, weights: Path | None) -> tuple[Any, Any, str]:
    """Model, processor, and the sha256 of the weights.

    Raises
    ------
    ValueError
        If the weights are not those of their digest.
    """
    folder = loader.folder(name) if weights is None else weights
    loader.check(folder)
    return *loader.read(folder), (folder / "sha256").read_text().strip()


def made_by(weights: Path | None) -> dict[str, Any]:
    """Minutes of each phase of the training beside whose export the weights are, for the report."""
    times = None if weights is None else weights.resolve().parent / "times.json"
    return {"training_minutes": json.loads(times.read_text())} if times is not None and times.is_file() else {}


def target(name: str, args: argparse.Namespace) -> Path:
    """Where the results go; those of other weights never replace those of the shipped ones."""
    stem = name.replace("-", "_").replace(".", "_")
    return args.out or RESULTS / f"{stem}{AGAIN if args.weights else ''}.json"
