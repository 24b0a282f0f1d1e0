# SPDX-License-Identifier: Apache-2.0
"""Pictures, questions and answers to train on, and their batches for a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vtoken.compat import chat_inputs
from vtoken.shorten import TYPES

IGNORED = -100
FIELDS = ("image", "prompt", "answer")
_STREAM = 99  # of random numbers: not one of those that the embedded models were trained with


@dataclass(frozen=True)
class Example:
    """A question about pictures (paths or PIL images) and its answer."""

    images: tuple[Any, ...]
    prompt: str
    answer: str


class Source(Protocol):
    """Where examples come from."""

    def draw(self, number: int, size: int) -> list[Example]:
        """Batch ``number`` of ``size`` examples: the same ones each time it is asked for."""
        ...


class MiniSource:
    """Scenes and questions of the embedded models' training split; held-out ones are never drawn.

    Parameters
    ----------
    seed : int
        Of the stream of scenes.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def draw(self, number: int, size: int) -> list[Example]:
        """See `Source`; the kinds of questions take turns."""
        from PIL import Image

        from vtoken.mini.questions import KINDS
        from vtoken.mini.world import Split, render, sample_scene

        rng = np.random.default_rng([Split.TRAIN, _STREAM, self.seed, number])
        kinds, found = list(KINDS.values()), list[Example]()
        while len(found) < size:
            scene = sample_scene(rng)
            question = kinds[(number * size + len(found)) % len(kinds)](scene, rng)
            if question is not None:
                picture = Image.fromarray(render(scene, rng))
                found.append(Example((picture,), question.text, question.answer))
        return found


class JsonlSource:
    """Lines ``{"image": path or list of paths, "prompt": ..., "answer": ...}``; paths are relative to the file.

    Parameters
    ----------
    path : Path
        The file.
    seed : int
        Of the order, which is new in every epoch.

    Raises
    ------
    ValueError
        If the file is missing or empty, or a line is no such example.
    """

    def __init__(self, path: Path, seed: int = 0) -> None:
        if not path.is_file():
            raise ValueError(f"There is no file {str(path)!r}: give JSON lines with {', '.join(FIELDS)}.")
        lines = path.read_text(encoding="utf-8").splitlines()
        self.seed = seed
        self.examples = [_example(line, path, n) for n, line in enumerate(lines, 1) if line.strip()]
        if not self.examples:
            raise ValueError(f"The file {str(path)!r} is empty: give JSON lines with {', '.join(FIELDS)}.")

    def draw(self, number: int, size: int) -> list[Example]:
        """See `Source`."""
        total, found = len(self.examples), []
        for place in range(number * size, (number + 1) * size):
            order = np.random.default_rng([self.seed, place // total]).permutation(total)
            found.append(self.examples[order[place % total]])
        return found


def _example(line: str, path: Path, number: int) -> Example:
    try:
        found = json.loads(line)
        images = [found["image"]] if isinstance(found["image"], str) else list(found["image"])
        prompt, answer = found["prompt"], found["answer"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"Line {number} of {path} is no example ({type(error).__name__}: {error}): write a JSON object with "
            f"{', '.join(FIELDS)}."
        ) from None
    if not isinstance(prompt, str) or not isinstance(answer, str) or not answer:
        raise ValueError(f"Line {number} of {path}: 'prompt' and 'answer' must be texts, the answer not empty.")
    files = tuple(path.parent / name for name in images)
    for file in files:
        if not file.is_file():
            raise ValueError(f"Line {number} of {path} names the picture {str(file)!r}, which is not there.")
    return Example(files, prompt, answer)


@dataclass
class Batch:
    """What a model is called with.

    Attributes
    ----------
    prompt : dict
        Inputs of the prompts alone, left padded: (B, P) tokens.
    whole : dict
        The same with the answers but their last token behind them, right padded.
    labels : Tensor
        (B, A) long: the answers, which the last A positions of ``whole`` predict; -100 on the padding.
    """

    prompt: dict[str, Any]
    whole: dict[str, Any]
    labels: Tensor


def collate(processor: Any, examples: Sequence[Example], device: torch.device | str = "cpu") -> Batch:
    """Chat-template, tokenize and pad examples.

    Raises
    ------
    ValueError
        If the processor has no chat template.
    """
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"{type(processor).__name__} has no chat template, so that prompts cannot be built: add one.")
    chats = [[{"role": "user", "content": _content(example)}] for example in examples]
    tokenizer, side = processor.tokenizer, processor.tokenizer.padding_side
    tokenizer.padding_side = "left"
    try:
        prompt = dict(chat_inputs(processor, chats, padding=True, return_tensors="pt").to(device))
    finally:
        tokenizer.padding_side = side
    ends = [tokenizer(example.answer, add_special_tokens=False)["input_ids"] for example in examples]
    rows = [torch.tensor([*ids, tokenizer.eos_token_id]) for ids in ends]
    labels = torch.nn.utils.rnn.pad_sequence(rows, True, IGNORED).to(device)
    given = labels[:, :-1]
    more = {"input_ids": given.clamp(min=0), "attention_mask": (given != IGNORED).long()}
    more |= {name: torch.zeros_like(given) for name in TYPES if name in prompt}
    whole = {**prompt, **{name: torch.cat([prompt[name], x.to(prompt[name].dtype)], 1) for name, x in more.items()}}
    return Batch(prompt, whole, labels)


def _content(example: Example) -> list[dict[str, Any]]:
    from PIL import Image

    images = [Image.open(x).convert("RGB") if isinstance(x, Path) else x for x in example.images]
    return [*({"type": "image", "image": image} for image in images), {"type": "text", "text": example.prompt}]
