# SPDX-License-Identifier: Apache-2.0
"""What ZOO-Prune's sensitivity orders by on two embedded models; writes benchmarks/results/sensitivity.json.

Rank correlation, picture by picture, of a token's sensitivity with the scale of its projector input (standard deviation
over the features). The projector of ``mini-internvl`` begins with a LayerNorm, that of ``mini-llava-next`` does not.

    python benchmarks/sensitivity.py
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
from harness import arguments, save
from scipy.stats import spearmanr

import vtoken
from vtoken.mini import load
from vtoken.mini.documents import held_out

MODELS = ("mini-internvl", "mini-llava-next")
PICTURES = 50


class Watched(vtoken.ZOOPrune):
    """Keeps the sensitivities, and the scale of what they belong to."""

    def _sensitivity(self, ctx: Any) -> torch.Tensor:
        found = super()._sensitivity(ctx)
        self.seen = found[ctx.candidates], ctx.projector_input[ctx.candidates].float().std(-1)
        return found


def measure(name: str, pictures: int) -> dict[str, Any]:
    """Correlations of one model over held-out pictures."""
    model, processor = load(name)
    reducer = Watched(keep=0.1)
    vtoken.wrap(model, reducer)
    found = []
    for document in held_out("attr", pictures):
        content = [*({"type": "image", "image": picture} for picture in document.images)]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": document.question}]}]
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        with torch.inference_mode():
            model(**inputs)
        sensitivity, scale = reducer.seen
        found.append(float(spearmanr(sensitivity.numpy(), scale.numpy()).statistic))
    return {"mean": fmean(found), "least": min(found), "most": max(found), "pictures": len(found)}


def main() -> None:
    """Measure both models."""
    args = arguments(__doc__)
    results = {name: measure(name, 2 if args.quick else PICTURES) for name in MODELS}
    for name, found in results.items():
        print(name, {key: round(value, 2) for key, value in found.items()}, flush=True)
    save("sensitivity", results, args)


if __name__ == "__main__":
    main()
