# SPDX-License-Identifier: Apache-2.0
"""The reducers that ``vtoken.wrap(model)`` chooses from, out of results/minis.json; writes vtoken/defaults.json.

Candidates have a keep ratio and spend no more token-layers than it says. They are ranked by accuracy on the family's
embedded model; what is equal there, and what other families take, by the mean over all models that ran a reducer with
all of them.

    python benchmarks/defaults.py           # after benchmarks/minis.py
    python benchmarks/defaults.py --check   # exit code 1 where the table is not that of the results
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from vtoken.defaults import FILE, OTHERS

RESULT = Path(__file__).parent / "results" / "minis.json"
FAMILIES = {
    "mini-llava": "llava",
    "mini-llava-next": "llava_next",
    "mini-internvl": "internvl",
    "mini-qwen2.5-vl": "qwen2_5_vl",
}
"""``config.model_type`` of the embedded models."""
SPECS = {"todre": "todre-max-sum"}
"""What the sweeps ran under the name of a reducer, where that is a preset."""
CONTROLS = ("random", "uniform", "pooled", "downsample")
ROUNDING = 1.0  # tokens: budgets are whole ones
LISTED = 6


def table(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """Names by family and keep ratio."""
    found: dict[float, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        keep, name = row["keep"], row["reducer"]
        if keep is None or name in CONTROLS or row["failed"]:
            continue
        if row["visual_per_layer"] <= keep * row["visual_tokens"] + ROUNDING:
            found[keep][name][FAMILIES[row["model"]]] = row["accuracy"]["value"]
    families: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for keep, reducers in sorted(found.items(), reverse=True):
        everywhere = {name: fmean(one.values()) for name, one in reducers.items() if len(one) == len(FAMILIES)}
        families[OTHERS][str(keep)] = ranked(everywhere)
        for family in FAMILIES.values():
            here = {name: (one[family], everywhere.get(name, 0.0)) for name, one in reducers.items() if family in one}
            families[family][str(keep)] = ranked(here)
    return dict(families)


def ranked(scores: dict[str, Any]) -> list[str]:
    """The best ones, as `vtoken.get_reducer` takes them."""
    return [SPECS.get(name, name) for name in sorted(scores, key=lambda name: (scores[name], name), reverse=True)][
        :LISTED
    ]


def main() -> None:
    """Write the table, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    families = table(json.loads(RESULT.read_text(encoding="utf-8"))["rows"])
    told = json.dumps({"made_from": f"benchmarks/results/{RESULT.name}", "families": families}, indent=1) + "\n"
    if not args.check:
        FILE.write_text(told, encoding="utf-8")
    elif told != FILE.read_text(encoding="utf-8"):
        sys.exit("vtoken/defaults.json is not what benchmarks/results/minis.json says: run benchmarks/defaults.py.")


if __name__ == "__main__":
    main()
