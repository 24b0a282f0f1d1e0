# SPDX-License-Identifier: Apache-2.0
"""Flat pages: time to first token and text answers of reducers in the vision tower; writes results/documents.json.

Pages whose cells (what becomes one token) are three quarters paper, on a shape of Qwen2.5-VL with random weights: the
time of a whole `generate` call of one token, tower included, of all settings in turn. ``scattered`` has its text cells
anywhere, so that about every second cell is predicted; ``paragraphs`` has them in blocks, as pages do.

Answers are those of ``mini-qwen2.5-vl`` on the pages of ``mini_read``: as they are, with noise in every pixel, and
``printed``, their paper one colour. Nothing of the former repeats, so that nothing may change at ``tau=0``.

    python benchmarks/documents.py
    python benchmarks/documents.py --device cuda --shape qwen2.5-vl-7b
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import race_around, save
from mini_models import inputs_of, score

import vtoken
import vtoken.mini
from vtoken.mini.documents import Document, held_out
from vtoken.profile.shapes import random_model, shape_config

MODEL, TASK, BATCH, LONGEST = "mini-qwen2.5-vl", "read", 25, 10
FLAT = 0.75
PAPER = 175
"""Pixels of ``mini_read`` that are lighter are paper: ink and strokes are darker than this with their noise."""
WORDS = 16  # text tokens on each side of the page

ANSWERING: dict[str, vtoken.Reducer] = {
    "pixelprune": vtoken.PixelPrune(),
    "ipcv": vtoken.IPCV(),
    "random": vtoken.Random(keep=0.65),
}
"""``random`` keeps about as many tokens of a printed page as ``pixelprune``."""


# ------------------------------------------------------------------------------------------------------------- pages
def cells(kind: str, side: int, rng: np.random.Generator) -> np.ndarray:
    """(side, side) bool: cells with text, a quarter of all."""
    wanted = round((1 - FLAT) * side**2)
    if kind == "scattered":
        text = np.zeros(side**2, dtype=bool)
        text[rng.choice(side**2, wanted, replace=False)] = True
        return text.reshape(side, side)
    text = np.zeros((side, side), dtype=bool)  # two columns of paragraphs, between margins, from the top
    column = (side - 3) // 2
    for row in (row for row in range(1, side - 1) if row % 4):
        for first in (1, 2 + column):
            text[row, first : first + min(column, wanted - int(text.sum()))] = True
    return text


def page(kind: str, side: int, patch: int, seed: int = 0) -> tuple[torch.Tensor, float]:
    """Pixel rows (patches, D) of a page of ``side`` x ``side`` tokens, as a processor makes them; its flat share."""
    rng = np.random.default_rng(seed)
    text = cells(kind, side, rng)
    ink = rng.random((side, side, 2, 2, 3, patch, patch), dtype=np.float32).round()
    pixels = torch.from_numpy(np.where(text[:, :, None, None, None, None, None], ink, np.float32(1.0)))
    pixels = (pixels - 0.45) / 0.27
    rows = pixels.unsqueeze(5).expand(-1, -1, -1, -1, -1, 2, -1, -1)  # a still is two equal frames
    return rows.reshape(side**2 * 4, -1).contiguous(), 1 - float(text.mean())


def page_inputs(model: Any, kind: str, side: int) -> tuple[dict[str, torch.Tensor], float]:
    """Arguments of ``generate`` for one page between words."""
    config, parameter = model.config, next(model.parameters())
    rows, flat = page(kind, side, config.vision_config.patch_size)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, 500, (1, 2 * WORDS), generator=generator)
    picture = torch.full((1, side**2), config.image_token_id)
    ids = torch.cat([words[:, :WORDS], picture, words[:, WORDS:]], 1).to(parameter.device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": rows.to(parameter),
        "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]], device=parameter.device),
    }, flat


# ------------------------------------------------------------------------------------------------------------- times
def kept_by(model: Any, inputs: dict[str, torch.Tensor], reducer: vtoken.Reducer) -> dict[str, Any]:
    """What a reducer leaves of tokens, and of patches in the tower."""
    with vtoken.reduce(model, reducer):
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        stats = vtoken.stats(model)
    found: dict[str, Any] = {"tokens": stats.tokens_kept / stats.tokens_in}
    if stats.patches is not None:
        found["patches"] = stats.patches[1] / stats.patches[0]
    return found


def first_tokens(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds to the first token on both kinds of page, and how much faster than unpruned."""
    dtype = torch.bfloat16 if args.device != "cpu" else torch.float32
    model = random_model(shape_config(args.shape), device=args.device, dtype=dtype)
    results: dict[str, Any] = {}
    for kind in ("scattered", "paragraphs"):
        inputs, flat = page_inputs(model, kind, args.side)
        with torch.inference_mode():
            share = kept_by(model, inputs, vtoken.PixelPrune())["tokens"]
            settings: dict[str, vtoken.Reducer] = {
                "pixelprune": vtoken.PixelPrune(),
                "divprune, as many tokens": vtoken.DivPrune(keep=share),
                "ipcv, then divprune": vtoken.Chain([vtoken.IPCV(), vtoken.DivPrune(keep=share)]),
            }
            run = partial(model.generate, **inputs, max_new_tokens=1, do_sample=False)
            around = {name: partial(vtoken.reduce, model, reducer) for name, reducer in settings.items()}
            timed = race_around(dict.fromkeys(("unpruned", *settings), run), around, args.rounds, args.device)
            for name, reducer in settings.items():
                timed[name]["kept"] = kept_by(model, inputs, reducer)
        results[kind] = {"flat": flat, "visual_tokens": args.side**2, "settings": timed}
        for name, found in timed.items():
            print(f"{kind:11} {name:26} {found['median']:9.1f} ms {found['speedup']:5.2f}x {found.get('kept', '')}")
    return {"shape": args.shape, "pages": results}


# ----------------------------------------------------------------------------------------------------------- answers
def printed(document: Document) -> Document:
    """The same page with paper of one colour."""
    images = (np.where(image.min(-1, keepdims=True) > PAPER, np.uint8(213), image) for image in document.images)
    return dataclasses.replace(document, images=tuple(images))


def answers(model: Any, processor: Any, documents: list[Document]) -> tuple[list[str], list[float]]:
    """Texts, and the share of tokens that each batch kept where the model is wrapped."""
    texts: list[str] = []
    shares: list[float] = []
    for start in range(0, len(documents), BATCH):
        inputs = inputs_of(processor, documents[start : start + BATCH], False)
        out = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
        texts += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        try:
            stats = vtoken.stats(model)
        except ValueError:  # not wrapped
            continue
        shares.append(stats.tokens_kept / stats.tokens_in)
    return [text.strip() for text in texts], shares


def read_pages(count: int) -> dict[str, Any]:
    """Accuracy on ``mini_read`` and on its printed pages, and how many answers are those of the unpruned model."""
    model, processor = vtoken.mini.load(MODEL)
    noisy = held_out(TASK, count)
    results: dict[str, Any] = {}
    for kind, documents in (("mini_read", noisy), ("printed", [printed(document) for document in noisy])):
        plain, _ = answers(model, processor, documents)
        results[kind] = {"unpruned": {"accuracy": accuracy(documents, plain)}}
        for name, reducer in ANSWERING.items():
            with vtoken.reduce(model, reducer):
                texts, shares = answers(model, processor, documents)
            results[kind][name] = {
                "accuracy": accuracy(documents, texts),
                "same_answer": sum(a == b for a, b in zip(texts, plain, strict=True)) / len(documents),
                "tokens": sum(shares) / len(shares),
            }
        for name, found in results[kind].items():
            print(f"{kind:11} {name:12}", found, flush=True)
    return {"model": MODEL, "documents": count, "pages": results}


def accuracy(documents: list[Document], texts: list[str]) -> float:
    """Share of right answers."""
    return sum(score(document, text) for document, text in zip(documents, texts, strict=True)) / len(documents)


def main() -> None:
    """Measure times and answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="minimal sizes: does it run?")
    parser.add_argument("--device", default="cpu", help="for the times")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", default="qwen2.5-vl-small", help="of the model that is timed")
    parser.add_argument("--side", type=int, default=64, help="tokens of a page along each side")
    parser.add_argument("--documents", type=int, default=200, help="pages that are asked about")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    if args.quick:
        args.side, args.rounds, args.documents = 12, 1, min(args.documents, 4)
    torch.set_num_threads(args.threads)
    save("documents", {"first_token": first_tokens(args), "answers": read_pages(args.documents)}, args)


if __name__ == "__main__":
    main()
