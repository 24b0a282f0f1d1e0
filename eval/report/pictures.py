# SPDX-License-Identifier: Apache-2.0
"""Regressions as pictures: the question's image with what the reducer dropped in the dark."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import vtoken
from vtoken.drawing import kept, seen, shade
from vtoken.eval.comparison.regressions import Regression, worst_regressions
from vtoken.eval.comparison.runs import Run
from vtoken.eval.errors import EvalError, reason
from vtoken.eval.harness.driver import load_harness
from vtoken.eval.harness.tasksource import load_task
from vtoken.eval.model.loaded import LoadedModel
from vtoken.eval.model.loading import ModelSpec
from vtoken.eval.model.preprocessing import as_jpeg, media
from vtoken.eval.sweeps.cells import Cell, check_weights

QUALITY = 88  # of the JPEG


@dataclass(frozen=True)
class Picture:
    """A regression to look at.

    Parameters
    ----------
    regression : Regression
        What happened.
    question : str
        The prompt's text.
    image : str
        A ``data:`` address of a JPEG.
    tokens, kept, last : int
        Visual tokens of the picture, those that enter the language model, those that are left in its last layer.
    """

    regression: Regression
    question: str
    image: str
    tokens: int
    kept: int
    last: int


def draw_regressions(
    runs: Sequence[Run], count: int, before: Callable[[Regression], None] = lambda regression: None
) -> tuple[list[Picture], list[str]]:
    """Draw the worst regressions; loads their models, one at a time, and runs a prefill for each picture.

    Returns
    -------
    pictures : list of Picture
    notes : list of str
        Why others could not be drawn: a sentence each.
    """
    pictures, notes = [], []
    loaded: tuple[ModelSpec, LoadedModel] | None = None
    for regression in sorted(worst_regressions(runs, count), key=lambda found: found.run.model):
        before(regression)
        try:
            cell = _cell(regression.run)
            if loaded is None or loaded[0] != cell.model:
                loaded = None  # frees the former one first
                loaded = (cell.model, _load(cell))
            pictures.append(draw(regression, cell, loaded[1]))
        except Exception as error:
            notes.append(f"A regression on {regression.run.task} could not be drawn: {reason(error)}")
    return pictures, list(dict.fromkeys(notes))


def _cell(run: Run) -> Cell:
    """The cell of a run, on whatever device this machine has: a picture does not depend on it."""
    cell = Cell.of(run.record)
    return dataclasses.replace(cell, model=dataclasses.replace(cell.model, device=None))


def _load(cell: Cell) -> LoadedModel:
    check_weights(cell)
    load_harness()
    return LoadedModel(cell.model)


def draw(regression: Regression, cell: Cell, model: LoadedModel) -> Picture:
    """Run the reducer on the question again and show what it kept of the first image.

    Raises
    ------
    EvalError
        If the question has no image, or shows a clip.
    """
    from lmms_eval.protocol import ChatMessages

    task = load_task(cell.task.name, cell.model_type, cell.task.folder)
    talk = ChatMessages(messages=task.doc_to_messages(task.eval_docs[regression.doc_id])).to_hf_messages()
    images = [seen(image, model.processor) for image in media([talk], "image")]
    if not images or media([talk], "video"):
        raise EvalError("only questions about images can be drawn.")
    inputs = model.encode([talk])
    with model.under(cell.reducer):
        model.model.generate(**inputs, max_new_tokens=1, do_sample=False)
        tokens = vtoken.token_map(model.model, inputs, [(image.height, image.width) for image in images])
    first, last = (kept(tokens, choose) for choose in (min, max))
    image = as_jpeg(shade(images[0], tokens), QUALITY)
    text = " ".join(media([talk], "text"))
    return Picture(regression, text, image, len(tokens), int(first.sum()), int(last.sum()))
