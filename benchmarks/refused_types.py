# SPDX-License-Identifier: Apache-2.0
"""Write down with which sentence each image-text-to-text type of transformers is refused that has no adapter.

The models are those of the usual configurations, without storage. ``docs/families.md`` shows what is found, and
``tests/adapters/test_generic.py`` compares it with what happens.

    python benchmarks/refused_types.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import transformers

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benchmarks" / "results" / "types.json"


def main() -> None:
    """Write `FILE`."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import zoo

    refused = {name: zoo.refusal(name) for name in zoo.unserved()}
    text = json.dumps({"transformers": transformers.__version__, "refused": refused}, indent=1)
    FILE.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
