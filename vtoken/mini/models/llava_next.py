# SPDX-License-Identifier: Apache-2.0
"""``mini-llava-next``: a thumbnail and crops of 84 pixels, each 6 x 6 tokens, a newline after each row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

from vtoken.mini.model import IMAGE_TOKEN, WIDTH, clip_tower, decoder_sizes, name_ends
from vtoken.mini.models.base import (
    VOCAB,
    Architecture,
    Places,
    build_tokenizer,
    chat_template,
    grid_places,
    join_places,
)
from vtoken.mini.world import PATCH

TILE = 84
SIDE = TILE // PATCH
CROPS = [[2, 2], [1, 2], [2, 1], [1, 3], [3, 1]]  # rows, columns


def build_processor() -> LlavaNextProcessor:
    """Tokenizer and image processor."""
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=[[rows * TILE, columns * TILE] for rows, columns in CROPS],
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
        do_convert_rgb=True,
    )
    return LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(image_token=IMAGE_TOKEN),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
        chat_template=chat_template(IMAGE_TOKEN),
    )


def build_model(seed: int = 0) -> LlavaNextForConditionalGeneration:
    """The untrained model: the sizes of ``mini-llava`` with smaller pictures for the tower."""
    torch.manual_seed(seed)
    config = LlavaNextConfig(
        vision_config=clip_tower(TILE),
        text_config=LlamaConfig(**decoder_sizes(VOCAB)),
        image_token_index=VOCAB[IMAGE_TOKEN],
        image_grid_pinpoints=[[rows * TILE, columns * TILE] for rows, columns in CROPS],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    return name_ends(LlavaNextForConditionalGeneration(config), VOCAB)


def places(width: int, height: int, video: bool = False) -> Places:
    """The thumbnail, then the rows of the mosaic of crops; pictures are multiples of TILE pixels."""
    thumbnail = grid_places(SIDE, SIDE, (0, 0, width, height), scale=2)
    rows, columns = height // PATCH, width // PATCH
    mosaic = grid_places(rows, columns, (0, 0, width, height), part=True)
    crop = 1 + mosaic.row // SIDE * (columns // SIDE) + mosaic.column // SIDE
    mosaic = replace(mosaic, view=crop, row=mosaic.row % SIDE * 2, column=mosaic.column % SIDE * 2)
    joined = join_places([mosaic, grid_places(1, 1, (0, 0, 0, 0), view=-1, part=True)])
    order = np.full((rows, columns + 1), rows * columns)  # the newline comes last in ``joined``
    order[:, :columns] = np.arange(rows * columns).reshape(rows, columns)
    rolled = {name: getattr(joined, name)[order.reshape(-1)] for name in Places.__dataclass_fields__}
    return join_places([thumbnail, Places(**rolled)])


ARCHITECTURE = Architecture(
    name="mini-llava-next",
    build_model=build_model,
    build_processor=build_processor,
    places=places,
    tower="vision_tower",
    tower_width=WIDTH,
    cls_layers="vision_tower.encoder.layers",
    source="mini-llava",
    transferred={
        "vision_tower": "vision_tower",
        "multi_modal_projector": "multi_modal_projector",
        "language_model": "language_model",
    },
    tasks={"scene": 0.5, "read": 0.2, "multi": 0.12, "describe": 0.18},
    steps={"decoder": 1000, "spell": 1500, "tower": 1000, "joint": 1800, "polish": 300},
)
