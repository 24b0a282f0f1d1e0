# SPDX-License-Identifier: Apache-2.0
"""What dropping patches inside of the vision tower costs and brings; writes benchmarks/results/tower_prune.json.

Accuracy of the embedded LLaVA on held-out questions, and the time to first token, vision tower included, of a model
with the token layout of LLaVA-NeXT. ``--dev`` asks about development scenes instead and measures no time: defaults are
chosen there, never on the held-out scenes.

    python benchmarks/tower_prune.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import save
from mini_llava import BATCH, answer
from PIL import Image

import vtoken
import vtoken.mini
from vtoken.adapters.synthetic import synthetic_inputs
from vtoken.eval.tasks.data import load_data
from vtoken.mini.questions import KINDS
from vtoken.mini.world import Split, render, sample_scene
from vtoken.profile import profile
from vtoken.profile.attention import fastest_attention
from vtoken.profile.shapes import random_model, shape_config

Asked = list[tuple[Image.Image, dict[str, str]]]


def chain(keep: float, block: float) -> vtoken.Chain:
    """Part of the patches leave inside of the tower, then a tenth of the tokens stays."""
    return vtoken.Chain([vtoken.TowerPrune(keep=keep, block=block), vtoken.IDPruner(keep=0.1)])


SETTINGS: dict[str, vtoken.Reducer | None] = {
    "unpruned": None,
    **{
        f"tower keep={keep} block={block}": vtoken.TowerPrune(keep=keep, block=block)
        for block in (0.25, 0.5, 0.75)
        for keep in (0.5, 0.3)
    },
    "idpruner keep=0.1": vtoken.IDPruner(keep=0.1),
    **{f"tower keep=0.3 block={block}, idpruner keep=0.1": chain(0.3, block) for block in (0.25, 0.5, 0.75)},
}
TIMED = {
    "idpruner keep=0.1": vtoken.IDPruner(keep=0.1),
    **{f"tower keep=0.3 block={block}, idpruner keep=0.1": chain(0.3, block) for block in (0.25, 0.5)},
}


def held_out(limit: int) -> Asked:
    """The first questions of the mini task."""
    data = load_data()
    rows = data.questions[:limit]
    return [(Image.open(io.BytesIO(data.pictures[q["pictures"][0]])).convert("RGB"), q) for q in rows]


def development(limit: int) -> Asked:
    """Questions of every kind in turn on scenes that are neither trained on nor reported on."""
    found: Asked = []
    for number in range(limit):
        rng = np.random.default_rng([Split.DEV, number])
        scene = sample_scene(rng)
        picture = Image.fromarray(render(scene, rng))
        asked = list(KINDS.values())[number % len(KINDS)](scene, rng)
        if asked:
            found.append((picture, {"kind": asked.kind, "text": asked.text, "answer": asked.answer}))
    return found


def accuracy(model: Any, processor: Any, reducer: vtoken.Reducer | None, asked: Asked) -> dict[str, float]:
    """Share of right answers, of all questions and by kind."""
    right: dict[str, list[bool]] = {}
    with vtoken.reduce(model, reducer) if reducer is not None else contextlib.nullcontext():
        for start in range(0, len(asked), BATCH):
            images, questions = zip(*asked[start : start + BATCH], strict=True)
            for q, found in zip(questions, answer(model, processor, list(questions), list(images)), strict=True):
                right.setdefault(q["kind"], []).append(found.strip() == q["answer"])
    every = [hit for hits in right.values() for hit in hits]
    return {"all": sum(every) / len(every), **{kind: sum(hits) / len(hits) for kind, hits in sorted(right.items())}}


def first_tokens(args: argparse.Namespace) -> dict[str, Any]:
    """Profiles with the time to first token, unpruned and reduced in turn."""
    gpu = args.device != "cpu"
    shape = "llava-tiny" if args.quick else "llava-next-7b" if gpu else "llava-next-small"
    model = random_model(shape_config(shape), device=args.device, dtype=torch.bfloat16 if gpu else torch.float32)
    inputs = synthetic_inputs(model, 1, 2880)
    with torch.inference_mode():
        candidates = fastest_attention(model, inputs)
    results = {}
    for name, reducer in TIMED.items():
        found = profile(model, reducer, inputs, new_tokens=2, rounds=args.rounds, candidates=candidates)
        results[name] = found.as_dict()
        print(f"{shape} {name}: first token {found.speedup('first_token'):.2f}x", flush=True)
    return {"shape": shape, "profiles": results}


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="minimal sizes: does it run?")
    parser.add_argument("--dev", action="store_true", help="development scenes, no times, nothing written")
    parser.add_argument("--limit", type=int, default=400, help="questions")
    parser.add_argument("--device", default="cpu", help="for the times")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, processor = vtoken.mini.load("mini-llava")
    limit = 16 if args.quick else args.limit
    asked = development(limit) if args.dev else held_out(limit)
    found = {}
    for name, reducer in SETTINGS.items():
        found[name] = accuracy(model, processor, reducer, asked)
        print(f"{name:45} {found[name]['all']:.3f}", flush=True)
    if not args.dev:
        results = {"questions": len(asked), "accuracy": found, "first_token": first_tokens(args)}
        save("tower_prune", results, args)


if __name__ == "__main__":
    main()
