# SPDX-License-Identifier: Apache-2.0
"""The lmms-eval side of the bundled tasks: documents, pictures and clips, scoring."""

from __future__ import annotations

import functools
import io
from collections import Counter
from typing import Any

import datasets
import numpy as np
from lmms_eval.api.task import ConfigurableMessagesTask
from PIL import Image

from vtoken.eval.tasks.data import MIXED, load_data


class MiniTask(ConfigurableMessagesTask):
    """Questions of the mixed task, or of the set that a YAML names (``dataset_kwargs: {name: read}``).

    A class, because a YAML alone can only name data that is there already.
    """

    def __init__(self, config: dict[str, Any], model_name: str | None = None) -> None:
        super().__init__(config={k: v for k, v in config.items() if k != "class"}, model_name=model_name)

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Called by lmms-eval; nothing leaves the machine."""
        name = (dataset_kwargs or {}).get("name", MIXED)
        rows = [{**row, "set": name} for row in load_data(name).questions]
        self.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
        self.dataset_no_image = self.dataset


@functools.lru_cache(maxsize=2048)
def picture(name: str, number: int) -> Image.Image:
    """A decoded picture of a set; all cells of a sweep share it."""
    image = Image.open(io.BytesIO(load_data(name).pictures[number]))
    image.load()
    return image


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The pictures, or frames of the clip, that a question is about."""
    return [picture(doc["set"], number) for number in doc["pictures"]]


def doc_to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """Pictures first, then the question; the frames of a clip are one video."""
    found = doc_to_visual(doc)
    visual: list[dict[str, Any]]
    if doc["video"]:
        visual = [{"type": "video", "url": np.stack([np.asarray(frame) for frame in found])}]
    else:
        visual = [{"type": "image", "url": image} for image in found]
    return [{"role": "user", "content": [*visual, {"type": "text", "text": doc["text"]}]}]


def exact_match(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1.0 if the answer is right; case and surrounding space do not matter."""
    return {"exact_match": float(results[0].strip().lower() == doc["answer"])}


def content_f1(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Harmonic mean of precision and recall of the things that a description names, in any order."""
    said, shown = (_things(text) for text in (results[0], doc["answer"]))
    common = sum((said & shown).values())
    return {"content_f1": 2 * common / max(said.total() + shown.total(), 1)}


def _things(text: str) -> Counter[str]:
    return Counter(" ".join(part.split()) for part in text.lower().split(",") if part.strip())
