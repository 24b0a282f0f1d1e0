# SPDX-License-Identifier: Apache-2.0
"""The CPU measurements behind docs/speed.md, one process after the other: about an hour on two cores.

A script that fails does not stop the others, and what is written stays; the exit code is 1 then. Further arguments go
to every script.

    python benchmarks/run_all.py
    python benchmarks/run_all.py --only overhead memory --rounds 9
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

SCRIPTS = (
    *("memory", "overhead", "selection", "end_to_end", "encoder_scores"),
    *("tower_prune", "documents", "prefill_efficiency", "prefill_all"),
)


def main() -> int:
    """Run the scripts; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS, help="these alone")
    args, others = parser.parse_known_args()
    failed = False
    for name in args.only:
        started = time.monotonic()
        code = subprocess.run([sys.executable, Path(__file__).with_name(f"{name}.py"), *others]).returncode
        failed = failed or code != 0
        print(f"== {name}: exit code {code} after {time.monotonic() - started:.0f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
