# SPDX-License-Identifier: Apache-2.0
"""Measure the embedded LLaVA on its 2,000 held-out questions; writes benchmarks/results/mini_llava.json.

Conditions: unpruned; blind (no image tokens at all); random tokens at keep 0.05 and 0.25; the top [CLS] attention at
keep 0.25 (IDPruner with all weight on importance).

    python benchmarks/mini_llava.py
    python benchmarks/mini_llava.py --weights build/mini-llava/export   # trained again
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import time
from collections import defaultdict
from typing import Any

import torch
import transformers
from PIL import Image
from weights import add_arguments, load, made_by, target

import vtoken
from vtoken.eval.tasks.data import load_data

NAME = "mini-llava"
BATCH = 50
CONDITIONS: dict[str, Any] = {
    "unpruned": None,
    "blind": None,
    "random keep=0.05": vtoken.Random(keep=0.05),
    "random keep=0.25": vtoken.Random(keep=0.25),
    "[CLS] attention keep=0.25": vtoken.IDPruner(keep=0.25, lam=1.0),
}


def answer(model: Any, processor: Any, questions: list[dict], images: list[Image.Image] | None) -> list[str]:
    """Greedy answers to a batch of questions."""
    content = [[{"type": "text", "text": q["text"]}] for q in questions]
    if images is not None:
        content = [[{"type": "image"}, *parts] for parts in content]
    chats = [[{"role": "user", "content": parts}] for parts in content]
    prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt", add_special_tokens=False)
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def measure(model: Any, processor: Any, name: str, data: Any) -> dict[str, Any]:
    """Accuracy of one condition, overall and by kind."""
    right: dict[str, list[bool]] = defaultdict(list)
    reducer = CONDITIONS[name]
    with vtoken.reduce(model, reducer) if reducer is not None else contextlib.nullcontext():
        for start in range(0, len(data.questions), BATCH):
            batch = data.questions[start : start + BATCH]
            images = None
            if name != "blind":
                images = [Image.open(io.BytesIO(data.pictures[q["pictures"][0]])) for q in batch]
            for question, found in zip(batch, answer(model, processor, batch, images), strict=True):
                right[question["kind"]].append(found.strip() == question["answer"])
    by_kind = {kind: sum(r) / len(r) for kind, r in right.items()}
    every = [r for rows in right.values() for r in rows]
    return {"accuracy": sum(every) / len(every), "questions": len(every), "by_kind": by_kind}


def main() -> None:
    """Measure all conditions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    data = load_data()
    model, processor, digest = load(NAME, args.weights)
    results = {}
    for name in CONDITIONS:
        start = time.time()
        results[name] = measure(model, processor, name, data)
        results[name]["seconds"] = round(time.time() - start, 1)
        print(f"{name:28} {results[name]['accuracy']:.3f}", results[name]["by_kind"], flush=True)
    report = {
        "model": NAME,
        "weights_sha256": digest,
        **made_by(args.weights),
        "questions_fingerprint": data.fingerprint,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.processor() or platform.machine(),
        "conditions": results,
    }
    target(NAME, args).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
