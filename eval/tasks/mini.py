# SPDX-License-Identifier: Apache-2.0
"""The lmms-eval side of the bundled tasks: documents, pictures, scoring."""

from __future__ import annotations

import functools
import io
from typing import Any

import datasets
from lmms_eval.api.task import ConfigurableMessagesTask
from PIL import Image

from vtoken.eval.tasks.data import load_data


class MiniTask(ConfigurableMessagesTask):
    """Questions of one kind (``dataset_kwargs: {kind: color}``) or of all.

    A class, because a YAML alone can only name data that is there already.
    """

    def __init__(self, config: dict[str, Any], model_name: str | None = None) -> None:
        super().__init__(config={k: v for k, v in config.items() if k != "class"}, model_name=model_name)

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Called by lmms-eval; nothing leaves the machine."""
        kind = (dataset_kwargs or {}).get("kind")
        rows = [row for row in load_data().questions if kind in (None, row["kind"])]
        self.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
        self.dataset_no_image = self.dataset


@functools.lru_cache(maxsize=2048)
def picture(scene: int) -> Image.Image:
    """The decoded picture of a scene; all cells of a sweep share it."""
    image = Image.open(io.BytesIO(load_data().pictures[scene]))
    image.load()
    return image


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The picture that a question is about."""
    return [picture(doc["scene"])]


def exact_match(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1.0 if the answer is right; case and surrounding space do not matter."""
    return {"exact_match": float(results[0].strip().lower() == doc["answer"])}
