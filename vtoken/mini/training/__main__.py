# SPDX-License-Identifier: Apache-2.0
"""Train an embedded model: ``python -m vtoken.mini.training mini-llava-next --out build/mini-llava-next``.

``mini-llava`` starts from nothing (`vtoken.mini.training.scratch`); the others start from the shipped weights of an
embedded model (`vtoken.mini.training.transfer`).
"""

from __future__ import annotations

import argparse
import logging
import math
from pathlib import Path

import torch

from vtoken.mini.models import ARCHITECTURES
from vtoken.mini.training.scratch import Scratch
from vtoken.mini.training.transfer import Transfer


def main() -> None:
    """Command line of the training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(ARCHITECTURES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--phase", action="append", help="only this phase (repeat for several)")
    parser.add_argument("--steps", type=int, help="instead of each phase's own number")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop a phase after this time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    architecture = ARCHITECTURES[args.model]
    if unknown := set(args.phase or ()) - set(architecture.steps):
        parser.error(f"unknown phase {', '.join(sorted(unknown))}: {args.model} has {', '.join(architecture.steps)}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    run = (Transfer if architecture.source else Scratch)(architecture, args.out)
    for phase in args.phase or architecture.steps:
        run.run(phase, args.steps or architecture.steps[phase], args.minutes)


if __name__ == "__main__":
    main()
