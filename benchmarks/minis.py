# SPDX-License-Identifier: Apache-2.0
"""The complete comparison on the embedded models; writes benchmarks/results/minis.json.

Every reducer at four keep ratios, on the held-out documents of every task, as sweeps whose cells resume. The
scores of a reducer on one model are then pooled over its tasks and compared with those of `random` at the same keep
ratio, document by document; p-values are corrected over all rows of a model (Holm).

    python benchmarks/minis.py --executor ray
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from vtoken.eval.comparison.runs import RANDOM, UNPRUNED, Run, read_runs
from vtoken.eval.comparison.statistics import accuracy, holm, paired
from vtoken.eval.provenance import surroundings

RESULT = Path(__file__).parent / "results" / "minis.json"
SWEEPS = ("minis-llava", "minis-next", "minis", "minis-video")
DIGITS = 4
CLAIMED = (
    ("pyramiddrop", "fastv"),
    ("dart", "fastv"),
    ("sparsevlm", "fastv"),
    ("visionzip", "fastv"),
    ("globalcom2", "fastv"),
    ("divprune", "prumerge"),
    ("vispruner", "visionzip"),
    ("holov", "visionzip"),
    ("scope", "visionzip"),
    ("hiprune", "visionzip"),
    ("todre", "visionzip"),
    ("cdpruner", "divprune"),
    ("zooprune", "divprune"),
    ("idpruner", "divprune"),
)
"""A later method and an earlier one, over which it would be claimed to be ahead."""
CLAIMED_AT = (0.25, 0.1)

Key = tuple[str, str, Any]


def pooled(runs: list[Run]) -> tuple[list[float], list[str], list[str]]:
    """Scores, pictures and questions of all tasks, in one order for all reducers."""
    samples = [(run.task, sample) for run in runs for sample in run.samples]
    samples.sort(key=lambda pair: (pair[0], pair[1]["doc_id"]))
    return (
        [sample["score"] for _, sample in samples],
        [f"{task} {sample['cluster']}" for task, sample in samples],
        [f"{task} {sample['doc_id']}" for task, sample in samples],
    )


def claims(groups: dict[Key, list[Run]]) -> list[dict[str, Any]]:
    """Every pair of `CLAIMED` on every model, question by question; p-values corrected over all of them (Holm)."""
    found = []
    for model in dict.fromkeys(key[0] for key in groups):
        for keep in CLAIMED_AT:
            for new, old in CLAIMED:
                (ours, pictures, asked), (theirs, _, same) = (pooled(groups[model, name, keep]) for name in (new, old))
                if asked and asked == same:
                    test = paired(ours, theirs, pictures)
                    names = {"model": model, "keep": keep, "new": new, "old": old}
                    found.append({**names, **dataclasses.asdict(test.difference), "p_value": test.p_value})
    for claim, p in zip(found, holm([claim["p_value"] for claim in found]), strict=True):
        claim["adjusted"] = p
    return found


def row_of(key: Key, runs: list[Run], others: dict[Key, list[Run]]) -> dict[str, Any]:
    """One reducer at one keep ratio on one model."""
    model, reducer, keep = key
    scores, pictures, questions = pooled(runs)
    tokens = [sample["tokens"] for run in runs for sample in run.samples]
    row = {"model": model, "reducer": reducer, "keep": keep, "documents": len(scores)}
    row["accuracy"] = dataclasses.asdict(accuracy(scores, pictures))
    row["tasks"] = {run.task: fmean(sample["score"] for sample in run.samples) for run in runs}
    row["failed"] = {run.task: run.error for run in runs if run.error}
    for name in ("visual_tokens", "visual_per_layer", "evidence_recall"):
        known = [found[name] for found in tokens if found.get(name) is not None]
        row[name] = fmean(known) if known else None
    for name, twin in (("versus_random", (model, RANDOM, keep)), ("versus_unpruned", (model, UNPRUNED, None))):
        if twin == key or twin not in others:
            continue
        theirs, _, same = pooled(others[twin])
        if same == questions:
            found = paired(scores, theirs, pictures)
            row[name] = {**dataclasses.asdict(found.difference), "p_value": found.p_value}
    return row


def read(folders: list[Path]) -> dict[Key, list[Run]]:
    """Finished and failed runs by model, reducer and keep ratio, in the order of the sweeps."""
    groups: dict[Key, list[Run]] = defaultdict(list)
    for folder in folders:
        for run in read_runs(folder):
            groups[run.model, run.reducer, run.keep].append(run)
    for key, runs in groups.items():
        if len({run.task for run in runs}) < len(runs):
            raise SystemExit(f"{key} was run by several versions of vtoken: give --folder a new one.")
    return groups


def summary(groups: dict[Key, list[Run]]) -> list[dict[str, Any]]:
    """Rows by model."""
    finished = {key: [run for run in runs if run.samples] for key, runs in groups.items()}
    rows = [row_of(key, runs, groups) for key, runs in finished.items() if runs]
    for model in {row["model"] for row in rows}:
        for name in ("versus_random", "versus_unpruned"):
            found = [row[name] for row in rows if row["model"] == model and name in row]
            for versus, p in zip(found, holm([versus["p_value"] for versus in found]), strict=True):
                versus["adjusted"] = p
    return rows


def rounded(value: Any) -> Any:
    """Numbers with `DIGITS` digits behind the point."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return round(value, DIGITS) if isinstance(value, float) else value


def main() -> None:
    """Run the sweeps, or what is left of them, and summarize."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("vtoken-results/minis"), help="of the cells")
    parser.add_argument("--executor", default="local")
    parser.add_argument("--summary-only", action="store_true", help="run nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    for sweep in () if args.summary_only else SWEEPS:
        command = ["vtoken", "sweep", sweep, "--out", str(args.folder / sweep), "--executor", args.executor]
        subprocess.run(command, check=False)  # failed cells are in the summary
    groups = read(sorted(folder for folder in args.folder.iterdir() if folder.is_dir()))
    rows, tests = (",\n".join(json.dumps(rounded(one)) for one in found) for found in (summary(groups), claims(groups)))
    made_with = json.dumps(surroundings())
    args.out.write_text(f'{{"rows": [\n{rows}\n],\n"claims": [\n{tests}\n],\n"made_with": {made_with}}}\n')


if __name__ == "__main__":
    main()
