# SPDX-License-Identifier: Apache-2.0
"""``mini-qwen2.5-vl``: pictures of many sizes, videos, a windowed tower, 2 x 2 patches a token, M-RoPE."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from vtoken.mini.model import WIDTH, decoder_sizes, name_ends
from vtoken.mini.models.base import VOCAB, Architecture, Places, build_tokenizer, chat_template, grid_places, several
from vtoken.mini.videos import FRAMES, STEP
from vtoken.mini.world import PATCH

TOWER_LAYERS = 5
WINDOW = 4 * PATCH
IMAGE_PAD, VIDEO_PAD, START, END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
SECTIONS = [1, 2, 13]  # rotary pairs of time, rows and columns: slow pairs hardly tell neighbouring columns apart
FPS = 24  # that the processor assumes for frames of unknown speed
LIMITS = {"shortest_edge": 4 * PATCH**2, "longest_edge": 256 * PATCH**2}  # pixels, in spite of the names


def build_processor() -> Qwen2_5_VLProcessor:
    """Tokenizer, image and video processor."""
    common: dict[str, Any] = {
        "size": LIMITS,
        "patch_size": PATCH // 2,
        "temporal_patch_size": STEP,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
        "do_convert_rgb": True,
    }
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**common),
        tokenizer=build_tokenizer(image_token=IMAGE_PAD, video_token=VIDEO_PAD),
        video_processor=Qwen2VLVideoProcessor(**common, cap_pixels_per_frame=False),
        chat_template=chat_template(START + IMAGE_PAD + END, START + VIDEO_PAD + END),
    )


def build_model(seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """The untrained model: windows of 4 x 4 tokens in all but two layers, a decoder of ``mini-llava``'s size."""
    torch.manual_seed(seed)
    vision = {
        "depth": TOWER_LAYERS,
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_heads": 4,
        "patch_size": PATCH // 2,
        "temporal_patch_size": STEP,
        "spatial_merge_size": 2,
        "window_size": WINDOW,
        "fullatt_block_indexes": [1, 3],
        "out_hidden_size": WIDTH,
        "tokens_per_second": FPS // STEP,
    }
    text = {
        **decoder_sizes(VOCAB),
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": SECTIONS},
    }
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=VOCAB[IMAGE_PAD],
        video_token_id=VOCAB[VIDEO_PAD],
        vision_start_token_id=VOCAB[START],
        vision_end_token_id=VOCAB[END],
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    return name_ends(model, VOCAB)


def places(width: int, height: int, video: bool = False) -> Places:
    """The grid of a picture, or one grid for every two frames."""
    one = grid_places(height // PATCH, width // PATCH, (0, 0, width, height))
    return several(one, FRAMES // STEP) if video else one


ARCHITECTURE = Architecture(
    name="mini-qwen2.5-vl",
    build_model=build_model,
    build_processor=build_processor,
    places=places,
    tower="visual",
    tower_width=WIDTH,
    cls_layers="",
    source="mini-llava-next",
    transferred={"language_model": "language_model"},
    tasks={"scene": 0.3, "read": 0.15, "multi": 0.08, "describe": 0.15, "video": 0.32},
    steps={
        "places": 1500,
        "decoder": 1500,
        "spell": 800,
        "tower": 700,
        "align": 900,
        "joint": 300,
        "polish": 700,
    },
    tower_start="rotary",
    positions_unseen=True,
)
