# SPDX-License-Identifier: Apache-2.0
"""The complete comparison on the embedded models; writes benchmarks/results/minis.json.

Every reducer at four keep ratios, on the held-out documents of every task, as sweeps whose cells resume. The
scores of a reducer on one model are then pooled over its tasks and compared with those of `random` at the same keep
ratio, document by document; p-values are corrected over all rows of a model (Holm).

    python benchmarks/minis.py --executor ray
    python benchmarks/minis.py --executor ray --only mini-qwen2.5-vl   # after a change of that model; others stay
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
from collections import defaultdict
from importlib.resources import files
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from vtoken.eval.comparison.runs import RANDOM, Run, read_runs
from vtoken.eval.comparison.statistics import accuracy, holm, paired
from vtoken.eval.provenance import surroundings
from vtoken.eval.store.record import UNPRUNED

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
    """Every pair of `CLAIMED` on every model, question by question."""
    found = []
    for model in dict.fromkeys(key[0] for key in groups):
        for keep in CLAIMED_AT:
            for new, old in CLAIMED:
                (ours, pictures, asked), (theirs, _, same) = (pooled(groups[model, name, keep]) for name in (new, old))
                if asked and asked == same:
                    test = paired(ours, theirs, pictures)
                    names = {"model": model, "keep": keep, "new": new, "old": old}
                    found.append({**names, **dataclasses.asdict(test.difference), "p_value": test.p_value})
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


def sweep_of(name: str, only: list[str], folder: Path) -> str | None:
    """What ``vtoken sweep`` runs: a shipped sweep, or a copy of it with some of its models; None if it has none."""
    if not only:
        return name
    settings = yaml.safe_load((files("vtoken.configs") / "sweeps" / f"{name}.yaml").read_text(encoding="utf-8"))
    settings["models"] = [model for model in settings["models"] if model in only]
    if not settings["models"]:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return str(path)


def merged(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """A new report, and what an older one holds of other models; claims are corrected over all models (Holm)."""
    models = {row["model"] for row in new["rows"]}
    report = {
        name: sorted(
            [part for part in old.get(name, []) if part["model"] not in models] + new[name], key=itemgetter("model")
        )
        for name in ("rows", "claims")
    }
    report["made_with"] = {**old.get("made_with", {}), **new["made_with"]}
    for claim, p in zip(report["claims"], holm([claim["p_value"] for claim in report["claims"]]), strict=True):
        claim["adjusted"] = p
    return report


def main() -> None:
    """Run the sweeps, or what is left of them, and summarize."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("vtoken-results/minis"), help="of the cells")
    parser.add_argument("--executor", default="local")
    parser.add_argument("--only", nargs="+", default=[], metavar="MODEL", help="the rows of other models stay")
    parser.add_argument("--summary-only", action="store_true", help="run nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    for sweep in () if args.summary_only else SWEEPS:
        if (chosen := sweep_of(sweep, args.only, args.folder)) is not None:
            command = ["vtoken", "sweep", chosen, "--out", str(args.folder / sweep), "--executor", args.executor]
            subprocess.run(command, check=False)  # failed cells are in the summary
    groups = read(sorted(folder for folder in args.folder.iterdir() if folder.is_dir()))
    found = summary(groups)
    made_with = dict.fromkeys((row["model"] for row in found), surroundings())
    new = {"rows": found, "claims": claims(groups), "made_with": made_with}
    report = merged(new, json.loads(args.out.read_text()) if args.only else {})
    rows, tests = (",\n".join(json.dumps(rounded(one)) for one in report[name]) for name in ("rows", "claims"))
    made = json.dumps(report["made_with"])
    args.out.write_text(f'{{"rows": [\n{rows}\n],\n"claims": [\n{tests}\n],\n"made_with": {made}}}\n')


if __name__ == "__main__":
    main()
