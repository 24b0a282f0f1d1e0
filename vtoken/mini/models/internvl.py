# SPDX-License-Identifier: Apache-2.0
"""``mini-internvl``: up to four tiles of 84 pixels and a thumbnail, of 12 x 12 patches that make 6 x 6 tokens each."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    Qwen2Config,
)

from vtoken.mini.model import WIDTH, decoder_sizes, name_ends
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

TILE, TOWER_LAYERS = 84, 5
SIDE = TILE // PATCH  # tokens; a patch of the tower is half as wide
MOST_TILES = 4
CONTEXT, START, END, VIDEO = "<IMG_CONTEXT>", "<img>", "</img>", "<video>"


def build_processor() -> InternVLProcessor:
    """Tokenizer and image processor."""
    common: dict[str, Any] = {
        "size": {"height": TILE, "width": TILE},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
        "do_convert_rgb": True,
    }
    tokenizer = build_tokenizer(
        context_image_token=CONTEXT, start_image_token=START, end_image_token=END, video_token=VIDEO
    )
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(crop_to_patches=True, min_patches=1, max_patches=MOST_TILES, **common),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(**common),
        image_seq_length=SIDE**2,
        chat_template=chat_template(CONTEXT, VIDEO),
    )


def build_model(seed: int = 0) -> InternVLForConditionalGeneration:
    """The untrained model: a small InternViT, and a Qwen2 decoder of the size of ``mini-llava``'s."""
    torch.manual_seed(seed)
    vision = InternVLVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=4,
        attention_bias=True,
        image_size=[TILE, TILE],
        patch_size=[PATCH // 2, PATCH // 2],
        layer_scale_init_value=1.0,
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = Qwen2Config(**decoder_sizes(VOCAB), rms_norm_eps=1e-6, rope_parameters=rope)
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=VOCAB[CONTEXT],
        image_seq_length=SIDE**2,
        downsample_ratio=0.5,
        tie_word_embeddings=True,
    )
    return name_ends(InternVLForConditionalGeneration(config), VOCAB)


def places(width: int, height: int, video: bool = False) -> Places:
    """Tiles row by row, then the thumbnail; pictures are multiples of TILE pixels and more than one tile."""
    tiles = [
        grid_places(SIDE, SIDE, (x, y, x + TILE, y + TILE), view=n, part=True, scale=2)
        for n, (y, x) in enumerate((y, x) for y in range(0, height, TILE) for x in range(0, width, TILE))
    ]
    return join_places([*tiles, grid_places(SIDE, SIDE, (0, 0, width, height), view=len(tiles), scale=2)])


ARCHITECTURE = Architecture(
    name="mini-internvl",
    build_model=build_model,
    build_processor=build_processor,
    places=places,
    tower="vision_tower",
    tower_width=WIDTH,
    cls_layers="vision_tower.encoder.layer",
    source="mini-llava-next",
    transferred={"language_model": "language_model"},
    tower_start="intern",
    tasks={"scene": 0.4, "read": 0.3, "multi": 0.1, "describe": 0.2},
    steps={"decoder": 250, "tower": 1200, "joint": 900},
)
