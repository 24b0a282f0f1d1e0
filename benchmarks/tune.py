# SPDX-License-Identifier: Apache-2.0
"""Does a tuned setting hold on questions that it did not see? Writes benchmarks/results/tune.json.

``choices``: what ``vtoken tune`` chooses on the bundled tasks, how long it takes, and what the choice retains on
further questions of the same generator, which are none of the tasks'. ``replayed``: all settings answer these unseen
questions once, and many races are run on random draws of the answers; what a setting retains of all of them is then the
truth, and a choice below the target an error.

    python benchmarks/tune.py
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import arguments, save
from mini_models import inputs_of, score

from vtoken.eval.comparison.statistics import paired
from vtoken.eval.store.results import Store
from vtoken.eval.sweeps.sweep import load_sweep, shipped_sweep
from vtoken.eval.tasks.data import PER_TASK
from vtoken.eval.tune.costs import BARE
from vtoken.eval.tune.outcome import as_data
from vtoken.eval.tune.race import ERROR, Race, Setting
from vtoken.eval.tune.tuning import Tuned, candidates, run, tune
from vtoken.eval.tune.units import looks
from vtoken.mini import load
from vtoken.mini.documents import Document, held_out
from vtoken.profile.run import wrapped

CASES = {
    "mini-llava": ("exist", "attr"),
    "mini-llava-next": ("exist", "attr", "relation"),
    "mini-internvl": ("exist", "attr", "relation"),
}
"""Model -> what it is asked; `mini-llava` knows no relations in pictures of other sizes."""
RETAIN, OBJECTIVE = 0.98, "tokens"
UNSEEN, BATCH, LONGEST = 500, 50, 8  # further questions of each task, documents a batch, tokens an answer
RACES, ROUNDS = 500, 1000  # replayed races, and units that each can ask
TARGETS = (0.95, 0.98)  # of the replayed races


def tuned(name: str, kinds: tuple[str, ...], questions: int | None, folder: Path) -> tuple[Tuned, float]:
    """What the command does, and how many seconds it takes with loading the model."""
    overrides = {"models": [name], "tasks": [f"mini_{kind}" for kind in kinds]}
    start = time.perf_counter()
    cells = candidates(load_sweep(shipped_sweep("tune"), overrides).cells())
    found = tune(cells, Store(folder), retain=RETAIN, objective=OBJECTIVE, questions=questions)
    return found, time.perf_counter() - start


def answered(name: str, documents: list[Document], reducers: dict[str, Any]) -> dict[str, np.ndarray]:
    """Scores of every document of one kind, unpruned and under each reducer."""
    model, processor = load(name)
    scores: dict[str, list[float]] = {}
    for start in range(0, len(documents), BATCH):
        batch = documents[start : start + BATCH]
        inputs = inputs_of(processor, batch, blind=False)
        for label, reducer in {BARE: None, **reducers}.items():
            with wrapped(model, reducer):
                out = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
            texts = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            scores.setdefault(label, []).extend(
                score(document, text.strip()) for document, text in zip(batch, texts, strict=True)
            )
    return {label: np.array(found) for label, found in scores.items()}


def unseen_scores(found: Tuned, kinds: tuple[str, ...], count: int) -> dict[str, np.ndarray]:
    """(questions, tasks) scores on documents behind those of the tasks, of all settings and unpruned."""
    columns = [answered(found.model, held_out(kind, PER_TASK + count)[PER_TASK:], found.reducers) for kind in kinds]
    return {name: np.stack([column[name] for column in columns], axis=1) for name in columns[0]}


def choice(found: Tuned, seconds: float, scores: dict[str, np.ndarray]) -> dict[str, Any]:
    """The choice beside what it retains on unseen questions."""
    data = as_data(found)
    kept = ("model", "tasks", "retain", "objective", "units", "sentences", "choice")
    report = {**{key: data[key] for key in kept}, "seconds": round(seconds, 1)}
    if found.best is None:
        return report
    name = found.best.setting.name
    versus = paired(scores[name].mean(1).tolist(), scores[BARE].mean(1).tolist())
    assert versus.retained is not None
    report["tuning"] = {"retained": found.best.retained, "bounds": found.race.bounds(found.best)._asdict()}
    report["unseen"] = {"questions_per_task": len(scores[name]), "retained": asdict(versus.retained)}
    return report


def replayed(found: Tuned, scores: dict[str, np.ndarray], target: float, races: int, units: int) -> dict[str, Any]:
    """How many races end in a choice, and how many of these choices miss the target on all that was answered."""
    settings = [standing.setting for standing in found.race.standings]
    truth = {name: values.sum() / scores[BARE].sum() for name, values in scores.items()}
    rng = np.random.default_rng(0)
    chosen: list[Setting] = []
    for _ in range(races):
        race = Race(settings, target, units)
        run(race, looks(units), drawn(scores, rng, units))
        if race.best is not None:
            chosen.append(race.best.setting)
    wrong = sum(truth[setting.name] < target for setting in chosen)
    good = [setting.cost for setting in settings if truth[setting.name] >= target]
    return {
        "target": target,
        "races": races,
        "units": units,
        "chosen": len(chosen),
        "wrong": wrong,
        "allowed": ERROR,
        "cheapest_possible": min(good, default=None),
        "mean_cost_of_choices": float(np.mean([setting.cost for setting in chosen])) if chosen else None,
        "truth": {name: round(float(value), 4) for name, value in truth.items() if name != BARE},
    }


def drawn(scores: dict[str, np.ndarray], rng: np.random.Generator, units: int) -> Callable[..., Any]:
    """Answers of a race: units drawn with replacement, each task's by itself."""
    count, tasks = scores[BARE].shape
    rows = rng.integers(count, size=(units, tasks))
    ends = [0, *looks(units)]

    def ask(names: list[str], look: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        part = rows[ends[look] : ends[look + 1]]
        return {name: np.take_along_axis(scores[name], part, axis=0) for name in (BARE, *names)}, {}

    return ask


def main() -> None:
    """All models; one with few questions if quick."""
    args = arguments(__doc__)
    results: dict[str, Any] = {"choices": [], "replayed": []}
    count, races, units = (40, 2, 64) if args.quick else (UNSEEN, RACES, ROUNDS)
    for name, kinds in list(CASES.items())[: 1 if args.quick else None]:
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            found, seconds = tuned(name, kinds, 40 if args.quick else None, Path(folder))
            scores = unseen_scores(found, kinds, count)
        results["choices"].append(choice(found, seconds, scores))
        print(f"{name}, {seconds:.0f} s:", *results["choices"][-1]["sentences"], sep="\n  ", flush=True)
        print("  unseen:", results["choices"][-1].get("unseen"), flush=True)
        for target in TARGETS:
            results["replayed"].append({"model": name, **replayed(found, scores, target, races, units)})
            print("  replayed:", {k: v for k, v in results["replayed"][-1].items() if k != "truth"}, flush=True)
    save("tune", results, args)


if __name__ == "__main__":
    main()
