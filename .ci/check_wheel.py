# SPDX-License-Identifier: Apache-2.0
"""A wheel must hold the package's own files, all of them, and nothing else.

    python .ci/check_wheel.py dist/vtoken-*.whl

A folder that is missing in pyproject.toml's list of packages, a file type that is missing in its package data, and what
only lies around in a checkout (tests, benchmarks, leftovers of an older build) all make it end with 1.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"vtoken": "vtoken", "adapters": "vtoken/adapters", "configs": "vtoken/configs", "eval": "vtoken/eval"}
"""Of the checkout -> where they are in the package."""
LICENCE = "licenses/LICENSE"


def wanted() -> set[str]:
    """Files of the checkout, by their place in the wheel."""
    return {
        f"{place}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, place in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def main(wheel: str) -> int:
    """Compare a wheel with the checkout; says on stderr what differs."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    about = {name for name in names if name.partition("/")[0].endswith(".dist-info")}
    faults = [f"missing: {name}" for name in sorted(wanted() - names)]
    faults += [f"has no place in it: {name}" for name in sorted(names - about - wanted())]
    if not any(name.endswith(LICENCE) for name in about):
        faults.append(f"missing: {LICENCE}")
    sys.stderr.writelines(f"{Path(wheel).name}: {fault}\n" for fault in faults)
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
