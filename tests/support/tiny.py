# SPDX-License-Identifier: Apache-2.0
"""Tiny random-weight models of the stock classes and hand-made inputs: no tokenizer, no download.

``make(family, images_per_row)`` -> (model, inputs of a left-padded batch).
"""

from __future__ import annotations

import torch
import transformers as tf
from torch import Tensor, nn

VOCAB, IMAGE_ID, VIDEO_ID, PAD, EOS = 200, 190, 191, 0, 199
VISION_START, VISION_END = 188, 189
WIDTH, SIDE, PATCH = 64, 24, 6

VERSION = tuple(map(int, tf.__version__.split(".")[:2]))
ENCODED_INPUT = VERSION >= (5, 18)
"""Whether models accept encoded pictures (``mm_encoder_outputs``)."""

BUILDERS = {}
CORE = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl")
"""Families on which the whole matrix of tests runs; the others run a part of it that the tests name."""
HYBRID = ("qwen3_5", "qwen3_5_moe")
"""Families with recurrent layers, in which hiding a token is another function than dropping it."""
BROKEN_CACHES = HYBRID if VERSION <= (5, 5) else ()
"""Families whose unwrapped models fail with a static cache and in a second turn, in transformers 5.5."""
PREFIX = ("paligemma",)
"""Families that read a prompt both ways: a later turn changes what an earlier one computed."""
SLIDING = ("gemma3", "aya_vision", "cohere2_vision")
"""Families with sliding-window layers, here with a window shorter than the prompts."""


def family(build):
    BUILDERS[build.__name__] = build
    return build


def text_config(**changes) -> dict:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "initializer_range": 0.15,
        **changes,
    }


def vision_config(**changes) -> dict:
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
        "initializer_range": 0.15,
        **changes,
    }


def assemble(rows: list[list[int | Tensor]], generator: torch.Generator) -> dict[str, Tensor]:
    """Rows of segments (int: that many text tokens; tensor: given ids), left padded."""
    ids = []
    for segments in rows:
        parts = [
            torch.randint(3, 180, (part,), generator=generator) if isinstance(part, int) else part for part in segments
        ]
        ids.append(torch.cat(parts))
    length = max(map(len, ids))
    out = torch.full((len(ids), length), PAD)
    mask = torch.zeros(len(ids), length, dtype=torch.long)
    for row, found in enumerate(ids):
        out[row, length - len(found) :] = found
        mask[row, length - len(found) :] = 1
    return {"input_ids": out, "attention_mask": mask}


def image_rows(lengths: list[int], images_per_row: tuple[int, ...], before: int = 3, after: int = 7) -> list:
    """One row of segments per batch row: text, then each image followed by two text tokens, then text."""
    rows, image = [], 0
    for number, count in enumerate(images_per_row):
        row: list[int | Tensor] = [before + 2 * number]
        for _ in range(count):
            row += [torch.full((lengths[image],), IMAGE_ID), 2]
            image += 1
        rows.append([*row, after])
    return rows


def make(name: str, images_per_row: tuple[int, ...] = (1,), seed: int = 0, attn: str = "sdpa", **changes):
    """A tiny model in eval mode and inputs with ``images_per_row[b]`` images in row b."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    model, inputs = BUILDERS[name](images_per_row, generator, **changes)
    with torch.no_grad():  # biases, norms and newlines must not be trivial
        for parameter in model.parameters():
            if parameter.dim() == 1 or not parameter.any():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.set_attn_implementation(attn)
    model.eval()
    config = model.generation_config
    config.pad_token_id, config.eos_token_id, config.bos_token_id = PAD, None, 1
    return model, inputs


TOWERS = {
    "clip": ("CLIPVisionConfig", {}),
    "siglip": ("SiglipVisionConfig", {}),
    "vit": ("ViTConfig", {}),
    "dinov2": ("Dinov2Config", {"mlp_ratio": 2}),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", {"mlp_ratio": 2, "num_register_tokens": 4}),
    "dinov3": ("DINOv3ViTConfig", {"num_register_tokens": 4}),
    "aimv2": ("Aimv2VisionConfig", {}),
    "pixtral": ("PixtralVisionConfig", {"image_size": 48, "head_dim": 8}),
    "siglip2": ("Siglip2VisionConfig", {"num_patches": (SIDE // PATCH) ** 2}),
}
LEADING = {"clip": 1, "vit": 1, "dinov2": 1, "dinov2_with_registers": 5, "dinov3": 5}
"""Tokens before the patches, written down from the papers; other towers have none."""
PIXTRAL_SIZES = [(24, 48), (48, 24), (36, 36)]


@family
def llava(images_per_row, generator, tower="clip", strategy=None, **text):
    """``strategy`` is the ``vision_feature_select_strategy``, by default the one that leaves the patches."""
    name, changes = TOWERS[tower]
    strategy = strategy or ("default" if LEADING.get(tower) == 1 else "full")
    config = tf.LlavaConfig(
        vision_config=getattr(tf, name)(**vision_config(**changes)),
        text_config=tf.LlamaConfig(**text_config(**text)),
        image_token_id=IMAGE_ID,
        vision_feature_layer=-2,
        vision_feature_select_strategy=strategy,
    )
    images = sum(images_per_row)
    lengths = [16 + LEADING.get(tower, 0) - (strategy == "default")] * images
    if tower == "pixtral":
        lengths = [height * width // PATCH**2 for height, width in pixtral_sizes(images)]
    inputs = assemble(image_rows(lengths, images_per_row), generator)
    if tower == "pixtral":
        inputs |= pixtral_pixels(images, generator)
    elif tower == "siglip2":  # a list of patches, in every other picture the last ones are padding
        shapes = torch.tensor([(4, 4), (3, 4)] * images)[:images]
        inputs["pixel_values"] = torch.randn(images, 16, 3 * PATCH**2, generator=generator)
        inputs["pixel_attention_mask"] = (torch.arange(16) < shapes.prod(1)[:, None]).long()
        inputs["spatial_shapes"] = shapes
    else:
        inputs["pixel_values"] = torch.randn(images, 3, SIDE, SIDE, generator=generator)
    return tf.LlavaForConditionalGeneration(config), inputs


def pixtral_sizes(images):
    return [PIXTRAL_SIZES[i % 3] for i in range(images)]


def pixtral_pixels(images, generator):
    """Pictures of unequal size, padded."""
    sizes = pixtral_sizes(images)
    pixels = torch.zeros(images, 3, 48, 48)
    for image, (height, width) in enumerate(sizes):
        pixels[image, :, :height, :width] = torch.randn(3, height, width, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


@family
def vipllava(images_per_row, generator):
    config = tf.VipLlavaConfig(
        vision_config=tf.CLIPVisionConfig(**vision_config()),
        text_config=tf.LlamaConfig(**text_config()),
        image_token_id=IMAGE_ID,
    )
    config.vision_feature_layers = [-2, 1]
    images = sum(images_per_row)
    inputs = assemble(image_rows([16] * images, images_per_row), generator)
    inputs["pixel_values"] = torch.randn(images, 3, SIDE, SIDE, generator=generator)
    return tf.VipLlavaForConditionalGeneration(config), inputs


ANYRES_SIZES = [(24, 48), (48, 24), (40, 20), (48, 48), (24, 24)]
PINPOINTS = [[24, 48], [48, 24], [48, 48]]
FRAMES = 3


def anyres_length(model: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """(views, tokens) of an image, from the model's own packing of dummy features."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    outer = model.model
    views = image_size_to_num_patches(list(size), outer.config.image_grid_pinpoints, SIDE)
    features = torch.zeros(views, (SIDE // PATCH) ** 2, WIDTH)
    if model.config.model_type == "llava_onevision":
        extra = {"vision_aspect_ratio": model.config.vision_aspect_ratio}
    else:
        extra = {"vision_feature_select_strategy": "default"}
    newline = outer.image_newline
    packed, _ = outer.pack_image_features([features], torch.tensor([size]), image_newline=newline, **extra)
    return views, len(packed[0])


def anyres_inputs(model, images_per_row, generator, sizes=ANYRES_SIZES):
    chosen = [sizes[i % len(sizes)] for i in range(sum(images_per_row))]
    found = [anyres_length(model, size) for size in chosen]
    pixels = torch.zeros(len(chosen), max((views for views, _ in found), default=1), 3, SIDE, SIDE)
    for image, (views, _) in enumerate(found):
        pixels[image, :views] = torch.randn(views, 3, SIDE, SIDE, generator=generator)
    inputs = assemble(image_rows([tokens for _, tokens in found], images_per_row), generator)
    return {**inputs, "pixel_values": pixels, "image_sizes": torch.tensor(chosen)}


def clip_inputs(clips, tokens, generator):
    """One clip of ``tokens`` placeholders in each row."""
    rows = [[4 + 2 * row, torch.full((tokens,), VIDEO_ID), 6] for row in range(clips)]
    pixels = torch.randn(clips, FRAMES, 3, SIDE, SIDE, generator=generator)
    return {**assemble(rows, generator), "pixel_values_videos": pixels}


@family
def llava_next(images_per_row, generator, sizes=ANYRES_SIZES):
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**vision_config()),
        text_config=tf.MistralConfig(**text_config(sliding_window=None)),
        image_token_id=IMAGE_ID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=PINPOINTS,
    )
    model = tf.LlavaNextForConditionalGeneration(config)
    return model, anyres_inputs(model, images_per_row, generator, sizes)


@family
def llava_onevision(images_per_row, generator, video=False, ratio="anyres_max_9", sizes=ANYRES_SIZES):
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**vision_config()),
        text_config=tf.Qwen2Config(**text_config()),
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=ratio,
        image_grid_pinpoints=PINPOINTS,
    )
    model = tf.LlavaOnevisionForConditionalGeneration(config)
    if video:
        return model, clip_inputs(len(images_per_row), FRAMES * 4 + 1, generator)
    return model, anyres_inputs(model, images_per_row, generator, sizes)


@family
def llava_next_video(images_per_row, generator, video=False, sizes=ANYRES_SIZES):
    config = tf.LlavaNextVideoConfig(
        vision_config=tf.CLIPVisionConfig(**vision_config()),
        text_config=tf.LlamaConfig(**text_config()),
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        spatial_pool_stride=2,
        image_grid_pinpoints=PINPOINTS,
    )
    model = tf.LlavaNextVideoForConditionalGeneration(config)
    if video:
        return model, clip_inputs(len(images_per_row), FRAMES * 4, generator)
    return model, anyres_inputs(model, images_per_row, generator, sizes)


QWEN_GRIDS = [(1, 8, 12), (1, 8, 8), (1, 12, 4), (1, 4, 8)]
QWEN_IDS = {
    "image_token_id": IMAGE_ID,
    "video_token_id": VIDEO_ID,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
QWEN_VISION = {
    "depth": 3,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def mrope(section, **changes) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section, **changes}}


def qwen_inputs(images_per_row, generator, video=False, timestamps=False):
    """Pictures, or one clip of three time steps per row; Qwen3-VL puts a timestamp before every step."""
    start, end = torch.tensor([VISION_START]), torch.tensor([VISION_END])
    grids = [QWEN_GRIDS[i % len(QWEN_GRIDS)] for i in range(sum(images_per_row))]
    rows, image = [], 0
    for number, count in enumerate(images_per_row):
        row = [3 + 2 * number]
        if video:
            step = [torch.full((8,), VIDEO_ID)]
            row += [start, *([2, *step] * 3 if timestamps else step * 3), end]
        else:
            for _, height, width in grids[image : image + count]:
                row += [start, torch.full((height * width // 4,), IMAGE_ID), end]
            image += count
        rows.append([*row, 7])
    if video:
        grids = [(3, 4, 8)] * len(images_per_row)
    inputs = assemble(rows, generator)
    kinds = (inputs["input_ids"] == IMAGE_ID).int() + 2 * (inputs["input_ids"] == VIDEO_ID).int()
    grid = torch.tensor(grids).view(-1, 3)
    pixels = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 16, generator=generator)
    names = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
    return {**inputs, "mm_token_type_ids": kinds, **dict(zip(names, (pixels, grid), strict=True))}


@family
def qwen2_vl(images_per_row, generator, video=False):
    config = tf.Qwen2VLConfig(
        text_config=text_config(**mrope([4, 2, 2])),
        vision_config={**QWEN_VISION, "embed_dim": 32, "hidden_size": WIDTH, "mlp_ratio": 2},
        **QWEN_IDS,
    )
    return tf.Qwen2VLForConditionalGeneration(config), qwen_inputs(images_per_row, generator, video)


@family
def qwen2_5_vl(images_per_row, generator, video=False):
    vision = {
        **QWEN_VISION,
        "hidden_size": 32,
        "out_hidden_size": WIDTH,
        "intermediate_size": 48,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }
    config = tf.Qwen2_5_VLConfig(text_config=text_config(**mrope([4, 2, 2])), vision_config=vision, **QWEN_IDS)
    return tf.Qwen2_5_VLForConditionalGeneration(config), qwen_inputs(images_per_row, generator, video)


QWEN3_VISION = {
    **QWEN_VISION,
    "hidden_size": 32,
    "out_hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@family
def qwen3_vl(images_per_row, generator, video=False):
    config = tf.Qwen3VLConfig(
        text_config=text_config(head_dim=16, **mrope([4, 2, 2], mrope_interleaved=True)),
        vision_config={**QWEN3_VISION, "deepstack_visual_indexes": [0, 1]},
        **QWEN_IDS,
    )
    return tf.Qwen3VLForConditionalGeneration(config), qwen_inputs(images_per_row, generator, video, timestamps=True)


@family
def qwen3_vl_moe(images_per_row, generator):
    config = tf.Qwen3VLMoeConfig(
        text_config=text_config(head_dim=16, **mrope([4, 2, 2], mrope_interleaved=True), **EXPERTS),
        vision_config={**QWEN3_VISION, "deepstack_visual_indexes": [0, 1]},
        **QWEN_IDS,
    )
    return tf.Qwen3VLMoeForConditionalGeneration(config), qwen_inputs(images_per_row, generator)


def hybrid_text(**changes) -> dict:
    """Every other layer is recurrent (gated delta net)."""
    return text_config(
        head_dim=16,
        **mrope([1, 1, 0], mrope_interleaved=True, partial_rotary_factor=0.25),
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_conv_kernel_dim=4,
        **changes,
    )


@family
def qwen3_5(images_per_row, generator):
    config = tf.Qwen3_5Config(text_config=hybrid_text(), vision_config=QWEN3_VISION, **QWEN_IDS)
    return tf.Qwen3_5ForConditionalGeneration(config), qwen_inputs(images_per_row, generator)


@family
def qwen3_5_moe(images_per_row, generator):
    text = hybrid_text(**EXPERTS, shared_expert_intermediate_size=32)
    config = tf.Qwen3_5MoeConfig(text_config=text, vision_config=QWEN3_VISION, **QWEN_IDS)
    return tf.Qwen3_5MoeForConditionalGeneration(config), qwen_inputs(images_per_row, generator)


TILES = [3, 1, 2]


def tile_inputs(images_per_row, generator, tokens, tiles=(1,)):
    """Square pictures of one token count; with ``tiles`` the placeholders of a picture's tiles are one run."""
    counts = [tiles[i % len(tiles)] for i in range(sum(images_per_row))]
    inputs = assemble(image_rows([count * tokens for count in counts], images_per_row), generator)
    pixels = torch.randn(sum(counts), 3, SIDE, SIDE, generator=generator)
    return {**inputs, "pixel_values": pixels}


@family
def internvl(images_per_row, generator):
    config = tf.InternVLConfig(
        vision_config={
            **vision_config(image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH]),
            "use_qk_norm": True,
            "norm_type": "rms_norm",
        },
        text_config=tf.Qwen2Config(**text_config()).to_dict(),
        image_token_id=IMAGE_ID,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return tf.InternVLForConditionalGeneration(config), tile_inputs(images_per_row, generator, 4, TILES)


@family
def gemma3(images_per_row, generator, window=14):
    text = text_config(
        head_dim=16,
        sliding_window=window,  # shorter than the prompts
        layer_types=["sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=16,
    )
    vision = {**vision_config(), "model_type": "siglip_vision_model"}
    config = tf.Gemma3Config(vision_config=vision, text_config=text, mm_tokens_per_image=4, image_token_id=IMAGE_ID)
    inputs = tile_inputs(images_per_row, generator, 4)
    inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE_ID).long()
    return tf.Gemma3ForConditionalGeneration(config), inputs


@family
def paligemma(images_per_row, generator):
    config = tf.PaliGemmaConfig(
        vision_config=tf.SiglipVisionConfig(**vision_config(projection_dim=WIDTH)).to_dict(),
        text_config=tf.GemmaConfig(**text_config(head_dim=16)).to_dict(),
        image_token_id=IMAGE_ID,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    inputs = tile_inputs(images_per_row, generator, 16)
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return tf.PaliGemmaForConditionalGeneration(config), inputs


def cohere_text() -> dict:
    return tf.Cohere2Config(**text_config(sliding_window=14, layer_types=["sliding_attention", "full_attention"] * 2))


@family
def aya_vision(images_per_row, generator):
    config = tf.AyaVisionConfig(
        vision_config=tf.SiglipVisionConfig(**vision_config()),
        text_config=cohere_text(),
        image_token_id=IMAGE_ID,
        downsample_factor=2,
    )
    return tf.AyaVisionForConditionalGeneration(config), tile_inputs(images_per_row, generator, 4)


@family
def cohere2_vision(images_per_row, generator):
    config = tf.Cohere2VisionConfig(
        vision_config=tf.SiglipVisionConfig(**vision_config()),
        text_config=cohere_text(),
        image_token_id=IMAGE_ID,
        downsample_factor=2,
        alignment_intermediate_size=96,
    )
    return tf.Cohere2VisionForConditionalGeneration(config), tile_inputs(images_per_row, generator, 4)


def idefics_inputs(images_per_row, generator):
    inputs = tile_inputs(images_per_row, generator, 4)
    pixels = torch.zeros(len(images_per_row), max(images_per_row), 3, SIDE, SIDE)
    rows = inputs["pixel_values"].split(list(images_per_row))
    for row, found in enumerate(rows):
        pixels[row, : len(found)] = found
    return {**inputs, "pixel_values": pixels}


def idefics_config() -> dict:
    return {
        "vision_config": vision_config(),
        "text_config": tf.LlamaConfig(**text_config()).to_dict(),
        "image_token_id": IMAGE_ID,
        "scale_factor": 2,
        "pad_token_id": PAD,
    }


@family
def idefics3(images_per_row, generator):
    model = tf.Idefics3ForConditionalGeneration(tf.Idefics3Config(**idefics_config()))
    return model, idefics_inputs(images_per_row, generator)


@family
def smolvlm(images_per_row, generator):
    model = tf.SmolVLMForConditionalGeneration(tf.SmolVLMConfig(**idefics_config()))
    return model, idefics_inputs(images_per_row, generator)


@family
def mistral3(images_per_row, generator):
    vision = {**vision_config(image_size=48), "model_type": "pixtral", "head_dim": 8}
    config = tf.Mistral3Config(
        vision_config=vision,
        text_config=tf.MistralConfig(**text_config(sliding_window=None)).to_dict(),
        image_token_id=IMAGE_ID,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    pixels = pixtral_pixels(sum(images_per_row), generator)
    lengths = [height * width // (2 * PATCH) ** 2 for height, width in pixels["image_sizes"].tolist()]
    inputs = assemble(image_rows(lengths, images_per_row), generator)
    model = tf.Mistral3ForConditionalGeneration(config)
    return model, {**inputs, **pixels}
