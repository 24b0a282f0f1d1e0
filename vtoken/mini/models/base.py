# SPDX-License-Identifier: Apache-2.0
"""What the training needs to know of an architecture, and the vocabulary that the transferred models share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vtoken.mini import documents
from vtoken.mini.model import ASSISTANT, BOS, EOS, PAD, UNK, USER
from vtoken.mini.model import VOCAB as FIRST_VOCAB

MARKS = ["<img>", "</img>", "<IMG_CONTEXT>", "<video>", "<|vision_start|>", "<|vision_end|>"]
MARKS += ["<|image_pad|>", "<|video_pad|>"]
VOCAB = {token: i for i, token in enumerate(dict.fromkeys([*FIRST_VOCAB, *MARKS, *documents.WORDS]))}
"""The words of ``mini-llava`` keep their ids."""


def chat_template(image: str, video: str = "") -> str:
    """Pictures first, numbered if there are several, then the text."""
    parts = "{{% for part in message['content'] | selectattr('type', 'equalto', '{kind}') %}}{mark}{{% endfor %}}"
    number = "{% if loop.length > 1 %} picture {{ loop.index }} {% endif %}"
    shown = parts.format(kind="image", mark=number + image)
    if video:
        shown += parts.format(kind="video", mark=video)
    return (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<user>' if message['role'] == 'user' else '<assistant>' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}" + shown + ""
        "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{% endif %}{% if message['role'] != 'user' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )


def build_tokenizer(**named: str) -> PreTrainedTokenizerFast:
    """Words are tokens; anything else is spelled letter by letter. ``named`` are the model's own special tokens."""
    core = Tokenizer(models.WordPiece(VOCAB, unk_token=UNK, max_input_chars_per_word=64))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        extra_special_tokens={"user_token": USER, "assistant_token": ASSISTANT, **named},
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def sincos(side: int, width: int) -> torch.Tensor:
    """(side * side, width) 2-D sines as a first position table: neighbours are found from the first step on."""
    quarter = width // 4
    freq = 1.0 / 50 ** (torch.arange(quarter) / quarter)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [axis.reshape(-1, 1) * freq for axis in (x, y)]
    return 0.2 * torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)


@dataclass(frozen=True)
class Places:
    """Where the N visual tokens of a document look.

    boxes (N, 4) are pixels of picture ``picture`` (N,) (of a video: of its frame); a newline has an empty box. ``part``
    (N,) bool marks tokens of a crop or tile, not of the whole picture; ``view`` (N,) numbers the crops, tiles or
    pictures in the order of the tower (a newline has -1), ``row`` and ``column`` (N,) count within them.
    """

    boxes: np.ndarray
    picture: np.ndarray
    part: np.ndarray
    view: np.ndarray
    row: np.ndarray
    column: np.ndarray


def grid_places(
    rows: int, columns: int, box: tuple[float, float, float, float], view: int = 0, part: bool = False, scale: int = 1
) -> Places:
    """The tokens of a grid over a box, in raster order; ``scale`` multiplies their row and column numbers."""
    row, column = (axis.reshape(-1) for axis in np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"))
    x0, y0, x1, y1 = box
    width, height = (x1 - x0) / columns, (y1 - y0) / rows
    left, top = x0 + column * width, y0 + row * height
    boxes = np.stack([left, top, left + width, top + height], 1)
    return Places(
        boxes=boxes,
        picture=np.zeros_like(row),
        part=np.full_like(row, part, dtype=bool),
        view=np.full_like(row, view),
        row=row * scale,
        column=column * scale,
    )


def join_places(parts: list[Places]) -> Places:
    """One after the other."""
    return Places(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in Places.__dataclass_fields__})


def several(one: Places, count: int) -> Places:
    """The visual tokens of ``count`` pictures of one size."""
    views = one.view.max() + 1
    numbered = [
        replace(one, picture=one.picture + n, view=np.where(one.view < 0, -1, one.view + n * views))
        for n in range(count)
    ]
    return join_places(numbered)


@dataclass(frozen=True)
class Architecture:
    """An embedded model and its training.

    Parameters
    ----------
    name : str
        Of the embedded model.
    build_model, build_processor : callable
        The untrained model of a seed, and its processor.
    places : callable
        (width, height) of one picture, or of the frames of a video, and whether it is one -> its visual tokens.
    tower : str
        Prefix of the parameters of ``model.model`` that are the vision tower.
    tower_width : int
        Of its states.
    cls_layers : str
        Its list of layers, "" if it has no [CLS]; that of the last two layers learns what a picture shows.
    steps : mapping
        Phase -> steps, in their order.
    source : str
        The embedded model from whose weights the training starts; "" if it starts from nothing.
    transferred : mapping
        Prefix of parameters of ``model.model`` -> prefix in the source.
    tasks : mapping
        Task -> share of the training batches.
    tower_start : str
        How a tower of other layers takes over the CLIP of ``mini-llava``: "intern" or "rotary", see
        `vtoken.mini.training.starts`; "" if it does not.
    positions_unseen : bool
        The tower cannot know rows and columns: the decoder finds them from its rotary positions.
    """

    name: str
    build_model: Callable[[int], Any]
    build_processor: Callable[[], Any]
    places: Callable[[int, int, bool], Places]
    tower: str
    tower_width: int
    cls_layers: str
    steps: Mapping[str, int]
    source: str = ""
    transferred: Mapping[str, str] = field(default_factory=dict)
    tasks: Mapping[str, float] = field(default_factory=dict)
    tower_start: Literal["", "intern", "rotary"] = ""
    positions_unseen: bool = False
