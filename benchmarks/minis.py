# SPDX-License-Identifier: Apache-2.0
"""The complete comparison on the embedded models; writes benchmarks/results/minis.json.

Every reducer at four keep ratios, on the held-out documents of every task, as sweeps whose cells resume. The
scores of a reducer on one model are then pooled over its tasks and compared with those of `random` at the same keep
ratio, document by document; p-values are corrected over all rows of a model (Holm).

    python benchmarks/minis.py --executor ray
    python benchmarks/minis.py --executor ray --only mini-qwen2.5-vl   # after a change of that model; others stay
    python benchmarks/minis.py --executor ray --reducers mmtok apet    # new ones; the rows of others stay
    python benchmarks/minis.py --executor ray --sweeps minis-repair --out benchmarks/results/repair.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
from collections import defaultdict
from collections.abc import Sequence
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
REPAIRED = " (repair=True)"

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
    """Every pair of `CLAIMED`, and what is repaired over what is not, on every model, question by question."""
    found = []
    repaired = dict.fromkeys(name for _, name, _ in groups if name.endswith(REPAIRED))
    pairs = (*CLAIMED, *((name, name.removesuffix(REPAIRED)) for name in repaired))
    for model in dict.fromkeys(key[0] for key in groups):
        for keep in CLAIMED_AT:
            for new, old in pairs:
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
    return corrected([row_of(key, runs, groups) for key, runs in finished.items() if runs])


def corrected(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, with p-values corrected over all of a model (Holm)."""
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


def sweep_of(name: str, only: Sequence[str], folder: Path, reducers: Sequence[str] = ()) -> str | None:
    """What ``vtoken sweep`` runs: a shipped sweep, or a copy of it with some of its models and reducers, and `RANDOM`.

    None if it has none of them.
    """
    if not only and not reducers:
        return name
    settings = yaml.safe_load((files("vtoken.configs") / "sweeps" / f"{name}.yaml").read_text(encoding="utf-8"))
    settings["models"] = [model for model in settings["models"] if model in only or not only]
    if reducers:
        settings["reducers"] = [one for one in settings["reducers"] if one in (RANDOM, *reducers)]
    if not settings["models"] or settings["reducers"] == [RANDOM]:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return str(path)


def merged(new: dict[str, Any], old: dict[str, Any], reducers: Sequence[str] = ()) -> dict[str, Any]:
    """A new report, and what an older one holds of other models and reducers, corrected over all of them (Holm)."""
    models = {row["model"] for row in new["rows"]}

    def stays(row: dict[str, Any]) -> bool:
        return row["model"] not in models or bool(reducers and row["reducer"] not in reducers)

    known = [row for row in old.get("rows", []) if stays(row)]
    have = {(row["model"], row["reducer"], row["keep"]): row for row in known}
    for row in new["rows"]:
        key = row["model"], row["reducer"], row["keep"]
        if key not in have:
            known.append(row)
        elif rounded(row["accuracy"]) != have[key]["accuracy"]:
            raise SystemExit(f"{key} answers otherwise than in the report: run all reducers of that model again.")
    claims = new["claims"] if not reducers else []
    report = {
        "rows": corrected(sorted(known, key=itemgetter("model"))),
        "claims": sorted(
            [one for one in old.get("claims", []) if reducers or one["model"] not in models] + claims,
            key=itemgetter("model"),
        ),
        "made_with": {**old.get("made_with", {}), **({} if reducers else new["made_with"])},
    }
    for claim, p in zip(report["claims"], holm([claim["p_value"] for claim in report["claims"]]), strict=True):
        claim["adjusted"] = p
    return report


def main() -> None:
    """Run the sweeps, or what is left of them, and summarize."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("vtoken-results/minis"), help="of the cells")
    parser.add_argument("--executor", default="local")
    parser.add_argument("--only", nargs="+", default=[], metavar="MODEL", help="the rows of other models stay")
    parser.add_argument("--reducers", nargs="+", default=[], metavar="NAME", help="the rows of others stay")
    parser.add_argument("--sweeps", nargs="+", default=SWEEPS, metavar="NAME", help="shipped ones")
    parser.add_argument("--summary-only", action="store_true", help="run nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    for sweep in () if args.summary_only else args.sweeps:
        if (chosen := sweep_of(sweep, args.only, args.folder, args.reducers)) is not None:
            command = ["vtoken", "sweep", chosen, "--out", str(args.folder / sweep), "--executor", args.executor]
            subprocess.run(command, check=False)  # failed cells are in the summary
    groups = read(sorted(folder for folder in args.folder.iterdir() if folder.is_dir()))
    found = summary(groups)
    made_with = dict.fromkeys((row["model"] for row in found), surroundings())
    new = {"rows": found, "claims": claims(groups), "made_with": made_with}
    old = json.loads(args.out.read_text()) if args.only or args.reducers else {}
    report = merged(new, old, args.reducers)
    rows, tests = (",\n".join(json.dumps(rounded(one)) for one in report[name]) for name in ("rows", "claims"))
    made = json.dumps(report["made_with"])
    args.out.write_text(f'{{"rows": [\n{rows}\n],\n"claims": [\n{tests}\n],\n"made_with": {made}}}\n')


if __name__ == "__main__":
    main()
