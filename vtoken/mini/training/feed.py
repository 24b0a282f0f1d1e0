# SPDX-License-Identifier: Apache-2.0
"""What a model sees in training: documents of all tasks, its own pixel inputs, and the prompt around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from vtoken.mini.documents import PAIR_KINDS, describe, read_number, read_word, sample_pictures, sample_size
from vtoken.mini.model import WIDTH
from vtoken.mini.models.base import Architecture, Places, several
from vtoken.mini.questions import KINDS
from vtoken.mini.training.answering import Prompt
from vtoken.mini.training.batches import SCENE_ASKS, Ask, Batch, Pack, ask, label_batch, pack
from vtoken.mini.training.labels import IGNORE, LOOK, PICTURE_LABELS
from vtoken.mini.videos import CELLS as SIDE
from vtoken.mini.videos import FRAMES, STEP, VIDEO_KINDS
from vtoken.mini.world import CELL, COLORS, LETTERS, SHAPES, Scene, sample_page, sample_scene

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
        size = max(2, self.columns // (len(self._places(task, cells).boxes) + QUESTIONS[task] * TOKENS_ASKED))
        if crowded and task == "scene":
            documents = [[sample_scene(self.rng, crowded=True, cells=cells, word_step=2)] for _ in range(size)]
        elif crowded and task == "read":
            documents = [[sample_page(self.rng, cells, crowded=True)] for _ in range(size)]
        else:
            documents = [sample_pictures(task, cells, self.rng) for _ in range(size)]
        return self.show(task, documents, cells)

    def show(self, task: str, documents: list[list[Scene]], cells: tuple[int, int]) -> Shown:
        """A batch of given documents, whose pictures have ``cells`` columns and rows of cells."""
        step = STEP if task == "video" else 1
        batch = label_batch(documents, self._places(task, cells), lambda scenes: scenes[step - 1 :: step])
        key = (task == "video", task == "multi", cells)
        if key not in self.prompts:
            self.prompts[key] = self._prompt(cells[0] * CELL, cells[1] * CELL, _pictures(task), task == "video")
        return Shown(batch, task, self.prompts[key])

    def _places(self, task: str, cells: tuple[int, int]) -> Places:
        one = self.architecture.places(cells[0] * CELL, cells[1] * CELL, task == "video")
        return several(one, _pictures(task))

    def ask(self, shown: Shown) -> Pack:
        """Questions of the task about every document."""
        asks, number = ASKS[shown.task], QUESTIONS[shown.task]
        asked = [ask(scenes, number, asks, self.rng) for scenes in shown.batch.scenes]
        return pack(asked, shown.batch.places, STEP if shown.task == "video" else 1)

    def pixels(self, shown: Shown, painted: list[list[np.ndarray]] | None = None) -> dict[str, torch.Tensor]:
        """The model's inputs for the painted pictures, by its own processor."""
        painted = shown.batch.paint(self.rng) if painted is None else painted
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


def encode(model: Any, pixels: dict[str, torch.Tensor], size: int) -> torch.Tensor:
    """(B, N, WIDTH) visual tokens, as they enter the language model."""
    encoder = model.model.get_video_features if "pixel_values_videos" in pixels else model.model.get_image_features
    found: Sequence[torch.Tensor] = encoder(**pixels, return_dict=True).pooler_output
    return torch.cat([part.reshape(-1, WIDTH) for part in found]).view(size, -1, WIDTH)


def surroundings(painted: list[list[np.ndarray]], places: Places, step: int = 1) -> torch.Tensor:
    """(B, N, 3 * LOOK**2) what each visual token would see of itself and of its neighbours, about its mean colour.

    ``step`` painted frames make one picture of ``places``, which is the last of them.
    """
    boxes = torch.from_numpy(places.boxes).float()
    share = (torch.arange(LOOK) + 0.5) / LOOK * 3 - 1  # of the token's side: from one side before it to one behind it
    x0, y0, x1, y1 = boxes[..., None].unbind(1)
    columns, rows = x0 + (x1 - x0) * share, y0 + (y1 - y0) * share
    out = torch.zeros(len(painted), len(boxes), 3 * LOOK**2)
    for picture in range(int(places.picture.max()) + 1):
        here = torch.from_numpy(np.flatnonzero(places.picture == picture))
        pixels = np.stack([document[picture * step + step - 1] for document in painted])
        shown = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 64
        size = torch.tensor([pixels.shape[2], pixels.shape[1]])
        grid = torch.stack(
            [
                columns[here][:, None].expand(-1, LOOK, -1) / size[0] * 2 - 1,
                rows[here][:, :, None].expand(-1, -1, LOOK) / size[1] * 2 - 1,
            ],
            -1,
        )
        found = F.grid_sample(
            shown, grid.flatten(0, 1).expand(len(painted), -1, -1, -1), padding_mode="border", align_corners=False
        )
        found = found.unflatten(2, (len(here), LOOK)).permute(0, 2, 1, 3, 4)
        out[:, here] = (found - found.mean((3, 4), keepdim=True)).flatten(2)
    return out


class ClsStates:
    """Records [CLS] of the last two layers of a tower."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.states: list[torch.Tensor] = []
        for layer in layers[-2:]:
            layer.register_forward_hook(self._record)

    def _record(self, module: nn.Module, args: Any, out: Any) -> None:
        self.states.append((out[0] if isinstance(out, tuple) else out)[:, 0])

    def take(self) -> list[torch.Tensor]:
        """What was recorded since the last call."""
        states, self.states = self.states, []
        return states


def view_labels(batch: Batch) -> torch.Tensor:
    """(B * views, PICTURE_LABELS) what each crop, tile or picture shows, in the order of the tower."""
    pair = batch.labels["color"] * len(SHAPES) + batch.labels["shape"]
    digit = batch.labels["digit"] + len(COLORS) * len(SHAPES)
    letter = batch.labels["letter"] + len(COLORS) * len(SHAPES) + 10
    shown = [
        (pair, batch.labels["shape"] != IGNORE),
        (digit, batch.labels["digit"] != IGNORE),
        (letter, (batch.labels["letter"] != IGNORE) & (batch.labels["letter"] < len(LETTERS))),
    ]
    views = torch.from_numpy(batch.places.view)
    count = int(views.max()) + 1
    out = torch.zeros(len(batch.scenes), count, PICTURE_LABELS)
    for label, known in shown:
        document, token = known.nonzero().unbind(1)
        out[document, views[token], label[document, token]] = 1
    return out.flatten(0, 1)
