# SPDX-License-Identifier: Apache-2.0
"""Measure the embedded models on held-out documents; writes benchmarks/results/mini_<model>.json.

Unpruned, and blind: without any visual token. Descriptions are scored by the F1 of the things named, all other answers
by exact match. What reducers do to the models: benchmarks/minis.py. ``mini-llava`` has older questions of its own:
benchmarks/mini_llava.py.

    python benchmarks/mini_models.py mini-llava-next
    python benchmarks/mini_models.py mini-llava-next --weights build/mini-llava-next/export   # trained again
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from weights import add_arguments, load, made_by, target

import vtoken.mini
from vtoken.mini.documents import TASKS, VERSION, Document, held_out

BATCH, LONGEST = 50, 24  # documents a batch, tokens an answer
CONDITIONS = ("unpruned", "blind")


def inputs_of(processor: Any, documents: list[Document], blind: bool) -> Any:
    """The model's inputs for a batch of documents of one kind."""
    chats = []
    for document in documents:
        count = 1 if document.video else len(document.images)
        shown = [] if blind else [{"type": "video" if document.video else "image"}] * count
        chats.append([{"role": "user", "content": [*shown, {"type": "text", "text": document.question}]}])
    prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    visual: dict[str, Any] = {}
    if not blind and documents[0].video:
        visual = {"videos": [np.stack(document.images) for document in documents], "do_sample_frames": False}
    elif not blind:
        visual = {"images": [[Image.fromarray(image) for image in document.images] for document in documents]}
    return processor(text=prompts, padding=True, return_tensors="pt", add_special_tokens=False, **visual)


def score(document: Document, found: str) -> float:
    """Exact match, or the F1 of the things that a description names."""
    if document.kind != "describe":
        return float(found == document.answer)
    wanted, named = set(document.answer.split(" , ")), set(found.split(" , "))
    return 2 * len(wanted & named) / (len(wanted) + len(named))


def measure(model: Any, processor: Any, name: str, documents: dict[str, list[Document]]) -> dict[str, Any]:
    """Mean score of one condition by kind, and the mean over kinds."""
    by_kind = {}
    for kind, every in documents.items():
        scores = []
        for start in range(0, len(every), BATCH):
            batch = every[start : start + BATCH]
            inputs = inputs_of(processor, batch, name == "blind")
            out = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
            texts = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            scores += [score(document, text.strip()) for document, text in zip(batch, texts, strict=True)]
        by_kind[kind] = round(sum(scores) / len(scores), 4)
    return {"mean": round(sum(by_kind.values()) / len(by_kind), 4), "by_kind": by_kind}


def main() -> None:
    """Measure one model under all conditions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=[name for name in vtoken.mini.names() if name != "mini-llava"])
    parser.add_argument("--count", type=int, default=500, help="documents of each kind")
    add_arguments(parser)
    args = parser.parse_args()
    model, processor, digest = load(args.model, args.weights)
    kinds = [kind for kind in TASKS if kind != "video" or hasattr(model.model, "get_video_features")]
    documents = {kind: held_out(kind, args.count) for kind in kinds}
    results = {}
    for name in CONDITIONS:
        start = time.time()
        results[name] = measure(model, processor, name, documents)
        results[name]["seconds"] = round(time.time() - start, 1)
        print(f"{name:26} {results[name]['mean']:.3f}", results[name]["by_kind"], flush=True)
    report = {
        "model": args.model,
        "weights_sha256": digest,
        **made_by(args.weights),
        "generator_version": VERSION,
        "documents_per_kind": args.count,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.processor() or platform.machine(),
        "conditions": results,
    }
    target(args.model, args).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
