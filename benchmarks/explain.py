# SPDX-License-Identifier: Apache-2.0
"""Relevance on the embedded LLaVA: oracle, learned map and its untrained input; writes benchmarks/results/explain.json.

The oracle keeps the tokens that `vtoken.explain.relevance` finds for the reference answer, which no reducer can know;
``explain`` keeps those that the scorer of ``vtoken train-scorer`` predicts, or, without a checkpoint, those that the
question attends to in the first layer.

    python benchmarks/explain.py --limit 160
"""

from __future__ import annotations

import argparse
import io
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

import vtoken
import vtoken.mini
from vtoken.checkpoints import load
from vtoken.eval.tasks.data import load_data
from vtoken.explain import relevance
from vtoken.training import Batch, Example, collate

RESULT = Path(__file__).parent / "results" / "explain.json"
BATCH, KEEP = 16, (0.25, 0.1)


def reducers(model: Any, batch: Batch, scorer: str, keep: float) -> dict[str, vtoken.Reducer]:
    """Name -> reducer, for one batch: the oracle knows its answers."""
    oracle = pad_sequence(relevance(model, batch.whole, batch.labels), True)
    return {
        "oracle": vtoken.IDPruner(keep=keep, lam=1.0, scorer=lambda ctx: oracle),
        "explain": vtoken.Explain(keep=keep, checkpoint=scorer),
        "explain, untrained": vtoken.Explain(keep=keep),
        "fopru": vtoken.FoPru(keep=keep),
        "random": vtoken.Random(keep=keep),
    }


def main() -> None:
    """Answer held-out questions with each reducer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scorer", default="mini-llava", help="a checkpoint, or mini-llava for the shipped one")
    parser.add_argument("--limit", type=int, default=160, help="held-out questions")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    model, processor = vtoken.mini.load("mini-llava")
    data, right = load_data(), dict[str, int]()
    limit = min(args.limit, len(data.questions))
    for start in range(0, limit, BATCH):
        asked = data.questions[start : min(start + BATCH, limit)]
        pictures = [Image.open(io.BytesIO(data.pictures[q["pictures"][0]])).convert("RGB") for q in asked]
        examples = [Example((p,), q["text"], q["answer"]) for p, q in zip(pictures, asked, strict=True)]
        batch = collate(processor, examples)
        for keep in KEEP:
            for name, reducer in reducers(model, batch, args.scorer, keep).items():
                with vtoken.reduce(model, reducer):
                    ids = model.generate(**batch.prompt, max_new_tokens=8, do_sample=False)
                found = processor.batch_decode(ids[:, batch.prompt["input_ids"].shape[1] :], skip_special_tokens=True)
                count = sum(text.strip() == q["answer"] for text, q in zip(found, asked, strict=True))
                right[f"{name} keep={keep}"] = right.get(f"{name} keep={keep}", 0) + count
    report = {
        "model": "mini-llava",
        "weights_sha256": (vtoken.mini.folder("mini-llava") / "sha256").read_text().strip(),
        "questions_fingerprint": data.fingerprint,
        "questions": limit,
        "scorer": load(args.scorer, "scorer").metadata,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.processor() or platform.machine(),
        "accuracy": {name: count / limit for name, count in right.items()},
    }
    print(json.dumps(report["accuracy"], indent=1))
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
