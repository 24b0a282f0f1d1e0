# SPDX-License-Identifier: Apache-2.0
"""Regressions as pictures: the question's image with what the reducer dropped in the dark."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vtoken.drawing import kept, seen, shade
from vtoken.eval.comparison.regressions import Regression, worst_regressions
from vtoken.eval.comparison.runs import Run
from vtoken.eval.errors import EvalError
from vtoken.eval.model.preprocessing import as_jpeg, media

_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
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
    from vtoken.eval.running.attempt import reason

    pictures, notes = [], []
    model: tuple[Any, Any] = (None, None)
    for regression in sorted(worst_regressions(runs, count), key=lambda found: found.run.model):
        before(regression)
        try:
            if model[0] != regression.run.config["model"]:
                model = (None, None)  # frees the former one first
                model = (regression.run.config["model"], _load(regression.run))
            pictures.append(draw(regression, model[1]))
        except Exception as error:
            notes.append(f"A regression on {regression.run.task} could not be drawn: {reason(error)}")
    return pictures, list(dict.fromkeys(notes))


def _load(run: Run) -> Any:
    from vtoken.eval.harness.driver import load_harness
    from vtoken.eval.model.loading import ModelSpec, weights_id

    load_harness()
    from vtoken.eval.model.reduced import ReducedModel

    config = run.config["model"]
    known = {field.name for field in dataclasses.fields(ModelSpec)} - {"device"}
    spec = ModelSpec(**{name: value for name, value in config.items() if name in known})
    if config["device"] in _DEVICE_MAPS:
        spec = dataclasses.replace(spec, device_map=config["device"])
    if spec.kind == "hub":
        spec = dataclasses.replace(spec, revision=config["weights"])
    elif weights_id(spec) != config["weights"]:
        raise EvalError(f"the weights of {spec.pretrained!r} are no longer those of the results.")
    return ReducedModel(spec)


def draw(regression: Regression, model: Any) -> Picture:
    """Run the reducer on the question again and show what it kept of the first image.

    Raises
    ------
    EvalError
        If the question has no image, or shows a clip.
    """
    from lmms_eval.protocol import ChatMessages

    import vtoken
    from vtoken.eval.harness.tasksource import load_task

    config = regression.run.config
    task = load_task(config["task"]["name"], config["model"]["model_type"])
    talk = ChatMessages(messages=task.doc_to_messages(task.eval_docs[regression.doc_id])).to_hf_messages()
    images = [seen(image, model.processor) for image in media([talk], "image")]
    if not images or media([talk], "video"):
        raise EvalError("only questions about images can be drawn.")
    inputs = model.encode([talk])
    model.use(vtoken.get_reducer(dict(config["reducer"])))
    try:
        model.model.generate(**inputs, max_new_tokens=1, do_sample=False)
        tokens = vtoken.token_map(model.model, inputs, [(image.height, image.width) for image in images])
    finally:
        model.use(None)
    first, last = (kept(tokens, choose) for choose in (min, max))
    image = as_jpeg(shade(images[0], tokens), QUALITY)
    text = " ".join(media([talk], "text"))
    return Picture(regression, text, image, len(tokens), int(first.sum()), int(last.sum()))
