# SPDX-License-Identifier: Apache-2.0
"""Tiny random-weight models of the stock classes and hand-made inputs: no tokenizer, no download.

``make(family, images_per_row)`` -> (model, inputs of a left-padded batch).
"""

from __future__ import annotations

import torch
import transformers as tf
from torch import Tensor, nn

VOCAB, IMAGE_ID, VIDEO_ID, PAD, EOS = 200, 190, 191, 0, 199
WIDTH, SIDE, PATCH = 64, 24, 6

BUILDERS = {}


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


@family
def llava(images_per_row, generator, tower="clip", **text):
    vision = tf.CLIPVisionConfig(**vision_config()) if tower == "clip" else tf.SiglipVisionConfig(**vision_config())
    config = tf.LlavaConfig(
        vision_config=vision,
        text_config=tf.LlamaConfig(**text_config(**text)),
        image_token_id=IMAGE_ID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
    )
    images = sum(images_per_row)
    inputs = assemble(image_rows([16] * images, images_per_row), generator)
    inputs["pixel_values"] = torch.randn(images, 3, SIDE, SIDE, generator=generator)
    return tf.LlavaForConditionalGeneration(config), inputs


ANYRES_SIZES = [(24, 48), (48, 24), (40, 20), (48, 48), (24, 24)]


def anyres_length(model: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """(views, tokens) of an image, from the model's own packing of dummy features."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    outer = model.model
    views = image_size_to_num_patches(list(size), outer.config.image_grid_pinpoints, SIDE)
    features = torch.zeros(views, (SIDE // PATCH) ** 2, WIDTH)
    packed, _ = outer.pack_image_features(
        [features],
        torch.tensor([size]),
        vision_feature_select_strategy="default",
        image_newline=outer.image_newline,
    )
    return views, len(packed[0])


@family
def llava_next(images_per_row, generator, sizes=ANYRES_SIZES):
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**vision_config()),
        text_config=tf.MistralConfig(**text_config(sliding_window=None)),
        image_token_id=IMAGE_ID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]],
    )
    model = tf.LlavaNextForConditionalGeneration(config)
    chosen = [sizes[i % len(sizes)] for i in range(sum(images_per_row))]
    found = [anyres_length(model, size) for size in chosen]
    pixels = torch.zeros(len(chosen), max(views for views, _ in found), 3, SIDE, SIDE)
    for image, (views, _) in enumerate(found):
        pixels[image, :views] = torch.randn(views, 3, SIDE, SIDE, generator=generator)
    inputs = assemble(image_rows([tokens for _, tokens in found], images_per_row), generator)
    return model, {**inputs, "pixel_values": pixels, "image_sizes": torch.tensor(chosen)}
