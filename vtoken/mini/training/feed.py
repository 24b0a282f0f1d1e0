# SPDX-License-Identifier: Apache-2.0
"""What a model sees in training: documents of all tasks, its own pixel inputs, and the prompt around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vtoken.mini.documents import PAIR_KINDS, describe, read_number, read_word, sample_pictures, sample_size
from vtoken.mini.models.base import Architecture, Places, several
from vtoken.mini.pages import sample_page
from vtoken.mini.questions import KINDS
from vtoken.mini.training.answering import Prompt
from vtoken.mini.training.batches import SCENE_ASKS, Ask, Batch, Pack, ask, label_batch, pack
from vtoken.mini.videos import CELLS as SIDE
from vtoken.mini.videos import FRAMES, STEP, VIDEO_KINDS
from vtoken.mini.world import CELL, CELLS, IMAGE, Scene, sample_scene

VIDEO_CELLS = (SIDE, SIDE)
COLUMNS = 3600  # of visual tokens and text in a batch
HARD_KINDS = [*KINDS, "existence", "position", "relation", "count", "word"]  # asked twice as often
READ_NUMBER: Ask = lambda scenes, rng: read_number(scenes[0], rng)  # noqa: E731
ASKS: dict[str, list[Ask]] = {
    "scene": [SCENE_ASKS[kind] for kind in HARD_KINDS],
    "describe": [lambda scenes, rng: describe(scenes[0], rng), SCENE_ASKS["existence"], SCENE_ASKS["count"]],
    "read": [READ_NUMBER, READ_NUMBER, lambda scenes, rng: read_word(scenes[0], rng)],
    "multi": list(PAIR_KINDS.values()),
    "video": list(VIDEO_KINDS.values()),
}
QUESTIONS = {"scene": 8, "describe": 3, "read": 3, "multi": 4, "video": 5}
TOKENS_ASKED = 14  # of a question and its answer, about
_OF_TOWER = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


@dataclass
class Shown:
    """A batch of documents as a model sees them."""

    batch: Batch
    task: str
    prompt: Prompt


def crowd(rng: np.random.Generator, cells: int) -> Scene:
    """A crowded square scene; one of twice the usual side is four usual ones, which have more things to show."""
    if cells < 2 * CELLS:
        return sample_scene(rng, crowded=True, cells=(cells, cells), word_step=2)
    corners = [(x, y) for y in (0, IMAGE) for x in (0, IMAGE)]
    items = [
        replace(item, x=item.x + x, y=item.y + y)
        for x, y in corners
        for item in sample_scene(rng, crowded=True, word_step=2).items
    ]
    return Scene(tuple(items), 2 * IMAGE, 2 * IMAGE)


def _pictures(task: str) -> int:
    return 2 if task == "multi" else 1


class Feed:
    """Draws the training documents of one model.

    Parameters
    ----------
    architecture : Architecture
        The model's.
    model : nn.Module
        Gives the rotary positions of a prompt.
    rng : Generator
        Draws everything.
    columns : int
        Of visual tokens and text in a batch, about.
    """

    def __init__(
        self, architecture: Architecture, model: Any, rng: np.random.Generator, columns: int = COLUMNS
    ) -> None:
        self.architecture, self.model, self.rng, self.columns = architecture, model, rng, columns
        self.processor = architecture.build_processor()
        self.prompts: dict[tuple, Prompt] = {}

    def draw(self, tasks: Mapping[str, float], crowded: bool = False) -> Shown:
        """A batch of one task, chosen by its share, of one picture size."""
        shares = np.array(list(tasks.values()))
        task = list(tasks)[int(self.rng.choice(len(shares), p=shares / shares.sum()))]
        cells = VIDEO_CELLS if task == "video" else sample_size(task, self.rng)
        size = self._size(task, self._places(task, cells))
        if crowded and task == "scene":
            documents = [[sample_scene(self.rng, crowded=True, cells=cells, word_step=2)] for _ in range(size)]
        elif crowded and task == "read":
            documents = [[sample_page(self.rng, cells, crowded=True)] for _ in range(size)]
        else:
            documents = [sample_pictures(task, cells, self.rng) for _ in range(size)]
        return self.show(task, documents, cells)

    def draw_small(self, cells: int) -> Shown:
        """Crowded square scenes of more cells than fit: shown smaller, so that a patch sees more of each thing."""
        shrunk = cells / CELLS
        places = self._places("scene", (CELLS, CELLS))
        places = replace(places, boxes=places.boxes * shrunk)
        documents = [[crowd(self.rng, cells)] for _ in range(self._size("scene", places))]
        batch = replace(label_batch(documents, places, lambda scenes: scenes), shrunk=shrunk)
        return Shown(batch, "scene", self._prompt_of("scene", (CELLS, CELLS)))

    def show(self, task: str, documents: list[list[Scene]], cells: tuple[int, int]) -> Shown:
        """A batch of given documents, whose pictures have ``cells`` columns and rows of cells."""
        step = STEP if task == "video" else 1
        batch = label_batch(documents, self._places(task, cells), lambda scenes: scenes[step - 1 :: step])
        return Shown(batch, task, self._prompt_of(task, cells))

    def _size(self, task: str, places: Places) -> int:
        """Documents in a batch."""
        return max(2, self.columns // (len(places.boxes) + QUESTIONS[task] * TOKENS_ASKED))

    def _prompt_of(self, task: str, cells: tuple[int, int]) -> Prompt:
        key = (task == "video", task == "multi", cells)
        if key not in self.prompts:
            self.prompts[key] = self._prompt(cells[0] * CELL, cells[1] * CELL, _pictures(task), task == "video")
        return self.prompts[key]

    def _places(self, task: str, cells: tuple[int, int]) -> Places:
        one = self.architecture.places(cells[0] * CELL, cells[1] * CELL, task == "video")
        return several(one, _pictures(task))

    def ask(self, shown: Shown) -> Pack:
        """Questions of the task about every document."""
        asks, number = ASKS[shown.task], QUESTIONS[shown.task]
        asked = [ask(scenes, number, asks, self.rng) for scenes in shown.batch.scenes]
        return pack(asked, shown.batch.places, STEP if shown.task == "video" else 1)

    def pixels(self, shown: Shown) -> dict[str, torch.Tensor]:
        """The model's inputs for the painted pictures, by its own processor."""
        painted = shown.batch.paint(self.rng)
        if shown.task == "video":
            videos = [torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2) for frames in painted]
            found = self.processor.video_processor(videos=videos, return_tensors="pt", do_sample_frames=False)
        else:
            images = [torch.from_numpy(image).permute(2, 0, 1) for document in painted for image in document]
            options = dict(self.processor.images_kwargs) if hasattr(self.processor, "images_kwargs") else {}
            found = self.processor.image_processor(images=images, return_tensors="pt", **options)
        return {name: found[name] for name in _OF_TOWER if name in found}

    def _prompt(self, width: int, height: int, pictures: int, video: bool) -> Prompt:
        blank = np.zeros((height, width, 3), np.uint8)
        content = [{"type": "video" if video else "image"}] * pictures
        text = self.processor.apply_chat_template([{"role": "user", "content": content}])
        shown: dict[str, Any] = {"images": [blank] * pictures}
        if video:
            shown = {"videos": [np.stack([blank] * FRAMES)], "do_sample_frames": False}
        inputs = self.processor(text=text, return_tensors="pt", add_special_tokens=False, **shown)
        ids = inputs.pop("input_ids")
        core, config = self.model.model, self.model.config
        slots = (ids[0] == (config.video_token_id if video else config.image_token_id)).nonzero()[:, 0]
        if hasattr(core, "get_rope_index"):
            inputs.pop("pixel_values", None), inputs.pop("pixel_values_videos", None)
            positions = core.get_rope_index(ids, **inputs)[0][:, 0]
        else:
            positions = torch.arange(ids.shape[1])[None]
        return Prompt(ids[0], slots, positions, int(positions[:, -1].max()) + 1)
