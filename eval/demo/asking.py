# SPDX-License-Identifier: Apache-2.0
"""What the button does: one model, one picture, one question, two answers. It must not know Gradio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vtoken.eval.errors import EvalError
from vtoken.eval.show.gallery import Answer, Prompt, Shown, built
from vtoken.registry import get_reducer, reducer_class

if TYPE_CHECKING:
    from pathlib import Path

EXAMPLES = ("attr", "count", "relation", "read", "describe")
"""Tasks of the embedded models' world whose first picture is offered."""


@dataclass(frozen=True)
class Compared:
    """Both answers to a question.

    Parameters
    ----------
    unpruned : Answer
        Of the model as it is.
    pruned : Shown
        What the reducer did with the picture, and the answer after it; its ``why`` if it cannot work on this model.
    """

    unpruned: Answer
    pruned: Shown


@dataclass(frozen=True)
class Asking:
    """One model that is asked; one question at a time.

    Parameters
    ----------
    name : str
        What the model is called.
    model, processor
        As `vtoken.eval.model.loading.load_model` gives them.
    max_new_tokens : int
        Of an answer.
    """

    name: str
    model: Any
    processor: Any
    max_new_tokens: int = 64

    def compare(self, picture: Any, question: str, reducer: str, keep: float) -> Compared:
        """Ask without and with a reducer.

        Parameters
        ----------
        picture : PIL image or None
            RGB.
        question : str
        reducer : str
            A registered name.
        keep : float
            Share of the visual tokens in (0, 1]; not told to a reducer that has no such parameter.

        Raises
        ------
        EvalError
            If there is no picture or no question, or the prompt is too long for the model.
        ValueError
            If the reducer is unknown or ``keep`` is out of range.
        """
        if picture is None:
            raise EvalError("There is no picture: upload one, or pick an example.")
        if not question.strip():
            raise EvalError("There is no question: write what you want to know about the picture.")
        reducer_class(reducer)  # a name: who asks over a network names no files
        chosen = built(reducer, keep)
        prompt = Prompt(self.model, self.processor, [picture], question.strip(), self.max_new_tokens)
        return Compared(prompt.answer(), prompt.show(chosen))


def summary(reducer: str) -> str:
    """One line about a reducer; that its keep ratio is its own where it takes none."""
    found = get_reducer(reducer)
    return found.summary if "keep" in found.config() else f"{found.summary} It takes no keep ratio."


def examples(folder: Path) -> Sequence[tuple[str, str]]:
    """Pictures of the embedded models' world, written to a folder, and a question about each."""
    from vtoken.mini.documents import held_out

    found = []
    for task in EXAMPLES:
        document, path = held_out(task, 1)[0], folder / f"{task}.png"
        _write(document.images[0], path)
        found.append((str(path), document.question))
    return found


def _write(pixels: Any, path: Path) -> None:
    from PIL import Image

    Image.fromarray(pixels).save(path)
