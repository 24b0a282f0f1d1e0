# SPDX-License-Identifier: Apache-2.0
"""Runs reducers on one prompt and collects what each does with its pictures. It must not know files or layouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import vtoken
from vtoken.drawing import LONG_EDGE, beside, seen, shade, size_of
from vtoken.eval.errors import EvalError, reason
from vtoken.eval.model.preprocessing import preprocessing
from vtoken.profile.clock import now

if TYPE_CHECKING:
    from PIL.Image import Image

    from vtoken.reducers.base import Reducer

PLAIN = "Describe the picture."
"""What a model is asked where only its pictures are of interest."""


@dataclass(frozen=True)
class Answer:
    """What the model said in one run, and how long it took.

    Parameters
    ----------
    text : str or None
        None where nothing was asked.
    first, whole : float
        Milliseconds until its first token, and until its last.
    """

    text: str | None
    first: float
    whole: float


@dataclass(frozen=True)
class Shown:
    """What one reducer did.

    Parameters
    ----------
    picture : PIL image or None
        Drawn; None if the reducer can't work on this model.
    tokens, kept, last : int
        Visual tokens of the prompt, those that enter the language model, those that are left behind its last layer.
    milliseconds : float
        Of the selection, in the second of two runs.
    answer : str or None
        None where nothing was asked.
    first, whole : float
        Milliseconds until the first token of that run, and until its last.
    layers : tuple of int
        Visual tokens in each decoder layer.
    why : str
        The reason, if there is no picture.
    """

    picture: Image | None
    tokens: int = 0
    kept: int = 0
    last: int = 0
    milliseconds: float = 0.0
    answer: str | None = None
    first: float = 0.0
    whole: float = 0.0
    layers: tuple[int, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Gallery:
    """A grid of reducers x keep ratios on one prompt.

    Parameters
    ----------
    model, question : str
    picture : PIL image
        As the model sees it.
    tokens : int
        Visual tokens of the prompt.
    answer : str or None
        Of the unpruned model.
    keeps : sequence
        The columns.
    rows : sequence of (str, list of Shown)
        A reducer's title and what it did at each keep.
    """

    model: str
    question: str | None
    picture: Image
    tokens: int
    answer: str | None
    keeps: Sequence[float | int]
    rows: Sequence[tuple[str, list[Shown]]]


class Prompt:
    """One question about pictures, as a model takes it.

    Parameters
    ----------
    model, processor
        As `vtoken.eval.model.loading.load_model` gives them.
    visuals : sequence
        PIL images and (T, H, W, 3) arrays.
    question : str or None
        None only looks at the pictures.
    max_new_tokens : int
        Of an answer.

    Raises
    ------
    EvalError
        If the model makes no visual tokens of them, or the prompt is longer than the model can read.
    """

    def __init__(
        self, model: Any, processor: Any, visuals: Sequence[Any], question: str | None, max_new_tokens: int
    ) -> None:
        self.model, self.processor, self.asked = model, processor, question is not None
        self.max_new_tokens = max_new_tokens
        visuals = sorted(
            visuals, key=lambda visual: not hasattr(visual, "convert")
        )  # as token maps count: images first
        self.visuals = [seen(visual, processor) for visual in visuals]
        parts = [_part(visual) for visual in visuals]
        talk = [{"role": "user", "content": [*parts, {"type": "text", "text": question or PLAIN}]}]
        encoded = preprocessing("checkpoint", model.config.model_type).encode(processor, [talk])
        self.inputs = encoded.to(model.device, model.dtype)
        length = self.inputs["input_ids"].shape[1]
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and length + max_new_tokens > longest:
            raise EvalError(
                f"The prompt has {length} tokens and an answer up to {max_new_tokens}, but the model reads {longest}: "
                "ask a shorter question, or show fewer or smaller pictures."
            )

    @torch.no_grad()
    def run(self, count: int) -> Answer:
        """The model's answer in up to ``count`` tokens."""
        tokenizer, watch = self.processor.tokenizer, _FirstToken(self.model)
        begun = now(self.model)
        out = self.model.generate(
            **self.inputs,
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([watch]),
        )
        whole = now(self.model) - begun
        new = out[:, self.inputs["input_ids"].shape[1] :]
        text = tokenizer.batch_decode(new, skip_special_tokens=True)[0].strip() if self.asked else None
        return Answer(text, (watch.at - begun) * 1e3, whole * 1e3)

    def answer(self) -> Answer:
        """The answer of the model as it is, wrapped or not, in the second of two runs."""
        self.run(1)  # warms up
        return self.run(self.max_new_tokens if self.asked else 1)

    def show(self, reducer: Reducer, edge: int = LONG_EDGE) -> Shown:
        """Run a reducer and draw what it did; the reason where it can't work here."""
        try:
            with vtoken.reduce(self.model, reducer):
                said, stats = self.answer(), vtoken.stats(self.model)
                sizes = [size_of(visual) for visual in self.visuals]
                tokens = vtoken.token_map(self.model, self.inputs, sizes)
        except (ValueError, TypeError, NotImplementedError) as error:
            return Shown(None, why=reason(error))
        picture = beside([shade(visual, tokens, number, edge) for number, visual in enumerate(self.visuals)])
        return Shown(
            picture,
            tokens=stats.tokens_in,
            kept=stats.tokens_kept,
            last=sum(image.kept_last for image in stats.images),
            milliseconds=stats.selection_seconds * 1e3,
            answer=said.text,
            first=said.first,
            whole=said.whole,
            layers=stats.by_layer,
        )


class _FirstToken(StoppingCriteria):
    """Stops nothing: it notes when the first token is there."""

    def __init__(self, model: Any) -> None:
        self.model, self.at = model, 0.0

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.at = self.at or now(self.model)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _part(visual: Any) -> dict[str, Any]:
    return {"type": "image", "image": visual} if hasattr(visual, "convert") else {"type": "video", "url": visual}


def gallery(
    prompt: Prompt,
    name: str,
    question: str | None,
    reducers: Sequence[str],
    keeps: Sequence[float | int],
    done: Callable[[], None] = lambda: None,
) -> Gallery:
    """Run every reducer at every keep ratio; ``done`` is called after each.

    Raises
    ------
    ValueError
        If a reducer or a keep ratio is unknown; before anything runs.
    EvalError
        If the model made no visual tokens of the pictures.
    """
    chosen = [(reducer, [built(reducer, keep) for keep in keeps]) for reducer in reducers]
    whole = prompt.show(vtoken.get_reducer("random", keep=1.0))
    if whole.picture is None:
        raise EvalError(f"Model {name!r} cannot be looked into: {whole.why}")
    rows = []
    for reducer, variants in chosen:
        cells = []
        for variant in variants:
            cells.append(prompt.show(variant))
            done()
        rows.append((reducer, cells))
    return Gallery(name, question, whole.picture, whole.tokens, whole.answer, keeps, rows)


def built(reducer: str, keep: float) -> Reducer:
    """A reducer at a keep ratio, which it is not told if it has none.

    Raises
    ------
    ValueError
        If either is unknown.
    """
    plain = vtoken.get_reducer(reducer)
    return vtoken.get_reducer(reducer, keep=keep) if "keep" in plain.config() else plain
