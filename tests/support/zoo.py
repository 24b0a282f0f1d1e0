# SPDX-License-Identifier: Apache-2.0
"""Tiny random-weight models of the types that `vtoken.adapters.generic` serves, and hand-made inputs.

A builder gives a model and what its processor makes of a picture; how many placeholders that needs is asked of the
model itself.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
import transformers
from oracles import ROWWISE, TOKEN_TYPES, TestReducer, content_score, eager_weights, extended, masked_oracle, runs_of
from tiny import IMAGE_ID, VIDEO_ID, WIDTH, assemble, image_rows, mrope, text_config, vision_config
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

import vtoken
from vtoken.adapters import Adapter, families
from vtoken.adapters.generic import find_outer
from vtoken.engine.tower import feature_list

TIMM = ("fast_vlm", "gemma3n", "perception_lm")
"""Types whose tower comes from timm."""
ROUNDED = ("nemotron_h_omni",)
"""Types whose recurrent layers scan a prompt in chunks, which rounds otherwise than a scan in steps."""
UNEQUAL = ("hunyuan_vl", "mistral_large4", "inkling_mm_model", "inkling2")
"""Types in which a padded batch differs from its rows without vtoken, too."""
SHORT = ("inkling_mm_model", "inkling2", "minimax_m3_vl", "glm5_next")
"""Types in which dropping tokens means a shorter prompt, and that are served before the decoder only."""
COMPACT = ("inkling_mm_model", "inkling2", "minimax_m3_vl")
"""Those of them whose positions must be counted anew."""
UNPADDED = ("minimax_m3_vl",)
"""Types that are wrong about padded rows without vtoken, too, so that only single rows are compared."""
MIXED = ("glm4v", "glm46v", "glmga", "ovis2", "glm5_next")
"""Types that give beams the pictures of other rows without vtoken, too, so that only single rows are compared."""
UNREADABLE = ("inkling_mm_model", "inkling2", "minimax_m3_vl")
"""Types whose decoder attention cannot be read."""
NO_BEAMS = ("fuyu", "llama4")
"""Types whose generate() raises for beams without vtoken, too."""
NO_PEEK = ("exaone4_5", "dots3_note", "gemma4", "gemma4_unified", "mistral_large4", "gemma3n")
NO_PEEK += ("qwen4_exp", "blip-2", "instructblip", "instructblipvideo")
"""Types whose attention can only be read where it has run."""
EAGER = ("inkling2",)
"""Types that know no sdpa."""
PICTURED = ("blip-2", "instructblip", "instructblipvideo")
"""Types that cannot be called without a picture."""

Picture = Callable[[int, torch.Generator], dict[str, Tensor]]
"""``picture(number, generator)``: what the processor would give for one picture; numbers differ in size."""
BUILDERS: dict[str, Callable[[], tuple[nn.Module, Picture]]] = {}

IDS = {"image_token_id": IMAGE_ID, "video_token_id": VIDEO_ID, "vision_start_token_id": 188, "vision_end_token_id": 189}
SLIDING = {"sliding_window": 14, "layer_types": ["sliding_attention", "full_attention"] * 2}
"""A window that is shorter than the prompts."""
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
EXPERTS |= {"topk_group": 1, "moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1}
EXPERTS |= {"shared_expert_intermediate_size": 32, "mlp_layer_types": ["dense", "sparse"] * 2}
GRIDS = [(1, 8, 12), (1, 8, 8), (1, 12, 4), (1, 4, 8)]
QWEN = {
    "depth": 3,
    "num_heads": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": WIDTH,
    "image_size": 48,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "initializer_range": 0.15,
}


def kind(*names: str):
    """Register a builder, which is given the name, for each of several types."""

    def register(build):
        for name in names:
            BUILDERS[name] = lambda name=name: build(name)
        return build

    return register


def of(name: str, text: dict | None = None, vision: dict | None = None, **top: Any) -> nn.Module:
    """The model of a type, from changes of tiny configurations."""
    make = CONFIG_MAPPING[name]
    usual = make()  # some configurations only know the types of their parts when these are written down
    parts = {"text_config": text_config(**{"head_dim": 16, **(text or {})}), "vision_config": vision or vision_config()}
    for part, changes in parts.items():
        if (found := getattr(usual, part, None)) is not None:
            parts[part] = {"model_type": found.model_type, **changes}
    config = make(**parts, **{**IDS, **top})
    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config)


def patches(width: int, *shape: int) -> Picture:
    """Flat patches of a picture with a grid, as Qwen's processors make them: ``width`` numbers, or of a ``shape``."""

    def picture(number: int, generator: torch.Generator) -> dict[str, Tensor]:
        grid = torch.tensor([GRIDS[number % len(GRIDS)]])
        rows = torch.randn(int(grid.prod()), width, generator=generator)
        return {"pixel_values": rows.view(-1, *shape) if shape else rows, "image_grid_thw": grid}

    return picture


def square(side: int = tiny.SIDE, *views: int, **more: Tensor) -> Picture:
    """Square pictures of one size, with further arguments that are the same for all."""

    def picture(number: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(1, *views, 3, side, side, generator=generator), **more}

    return picture


# ------------------------------------------------------------------------------------------------ towers of packed rows
@kind("glm4v", "glm46v", "glmga", "glm_ocr")
def glm(name):
    ids = {"image_start_token_id": 186, "image_end_token_id": 187, "video_start_token_id": 188}
    return of(name, mrope([4, 2, 2]), QWEN, **ids, video_end_token_id=189), patches(96)


@kind("glm4v_moe")
def glm4v_moe(name):
    ids = {"image_start_token_id": 186, "image_end_token_id": 187, "video_start_token_id": 188}
    text = {**mrope([4, 2, 2], partial_rotary_factor=1.0), **EXPERTS}
    return of(name, text, QWEN, **ids, video_end_token_id=189), patches(96)


@kind("cosmos3_omni")
def cosmos3_omni(name):
    text = mrope([4, 2, 2], mrope_interleaved=True)
    vision = {**QWEN, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    return of(name, {**text}, vision), patches(96)


@kind("qwen3_omni_moe_thinker")
def qwen3_omni(name):
    vision = {**QWEN, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    text = {**mrope([4, 2, 2], mrope_interleaved=True), **EXPERTS}
    return of(name, text, vision, audio_config=AUDIO, audio_token_id=192), patches(96)


AUDIO = {
    "num_mel_bins": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "d_model": 32,
    "output_dim": WIDTH,
    "downsample_hidden_size": 16,
}


@kind("qwen2_5_omni_thinker")
def qwen2_5_omni(name):
    vision = {**QWEN, "window_size": 16, "fullatt_block_indexes": [1]}
    ids = {"image_token_index": IMAGE_ID, "video_token_index": VIDEO_ID, "audio_token_index": 192}
    return of(name, mrope([4, 2, 2]), vision, audio_config=AUDIO, **ids), patches(96)


@kind("hyperclovax_vision_v2")
def hyperclovax(name):
    return of(name, {}, {**QWEN, "window_size": 16, "fullatt_block_indexes": [1]}), patches(96)


@kind("exaone4_5")
def exaone(name):
    vision = {**QWEN, "window_size": 16, "fullatt_block_indexes": [1], "num_key_value_heads": 2}
    text = {**SLIDING}
    return of(name, text, vision), patches(96)


@kind("ernie4_5_vl_moe")
def ernie(name):
    text = {**EXPERTS, **mrope([2, 2, 4]), "moe_intermediate_size": [32, 16], "moe_num_experts": 4, "moe_k": 2}
    ids = {"image_start_token_id": 186, "image_end_token_id": 187, "video_start_token_id": 188}
    return of(name, text, {**QWEN, "temporal_merge_size": 2}, **ids, video_end_token_id=189), patches(48)


@kind("paddleocr_vl")
def paddleocr(name):
    vision = vision_config(patch_size=4, spatial_merge_size=2, image_size=48)
    return of(name, mrope([4, 2, 2]), vision), patches(48, 3, 4, 4)


@kind("video_llama_3")
def video_llama_3(name):
    vision = vision_config(patch_size=4)

    def picture(number, generator):
        return {**patches(48)(number, generator), "image_merge_sizes": torch.tensor([2])}

    return of(name, {}, vision), picture


# ------------------------------------------------------------------------------------------------------ square pictures
@kind("deepseek_vl")
def deepseek_vl(name):
    return of(name, {}, vision_config()), square()


@kind("qianfan_ocr")
def qianfan(name):
    vision = {**vision_config(image_size=[24, 24], patch_size=[6, 6]), "use_qk_norm": True, "norm_type": "rms_norm"}
    return of(name, {}, vision, downsample_ratio=0.5), square()


@kind("shieldgemma2")
def shieldgemma2(name):
    text = {**SLIDING}
    text["query_pre_attn_scalar"] = 16
    return of(name, text, vision_config(), mm_tokens_per_image=4), square()


@kind("ovis2")
def ovis2(name):
    vision = vision_config(vocab_size=32, hidden_stride=2, num_visual_indicator_tokens=5)
    indicators = {"visual_indicator_token_ids": [180, 181, 182, 183, 184], "vocab_size": 200, "hidden_size": WIDTH}
    return of(name, {"model_type": "qwen2"}, vision, **indicators), square()


@kind("aria")
def aria(name):
    vision = {**vision_config(), "model_type": "idefics3_vision"}
    text = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1, "intermediate_size": 32}
    return of(name, text, vision, projector_patch_to_query_dict={16: 4}, image_token_index=IMAGE_ID), square()


@kind("deepseek_vl_hybrid")
def deepseek_vl_hybrid(name):
    high = {**SAM, "image_size": 48, "output_channels": 16}

    def picture(number, generator):
        large = torch.randn(1, 3, 48, 48, generator=generator)
        return {**square()(number, generator), "high_res_pixel_values": large}

    return of(name, {}, vision_config(), high_res_vision_config=high), picture


SAM = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 4,
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 48,
    "num_pos_feats": 8,
    "initializer_range": 0.15,
}


@kind("got_ocr2", "pp_chart2table")
def got_ocr2(name):
    return of(name, {}, SAM, image_token_index=IMAGE_ID), square(64)


@kind("idefics2")
def idefics2(name):
    perceiver = {"hidden_size": WIDTH, "resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 2}
    perceiver |= {"resampler_head_dim": 16, "num_key_value_heads": 1}
    return of(name, {"sliding_window": None}, vision_config(), perceiver_config=perceiver), square(24, 1)


@kind("janus")
def janus(name):
    vision = vision_config(projection_dim=WIDTH, num_image_tokens=16, mlp_ratio=2.0)
    vq = {"embed_dim": 8, "num_embeddings": 16, "latent_channels": 16, "base_channels": 32, "num_res_blocks": 1}
    vq |= {"channel_multiplier": [1, 1], "num_patches": 4, "projection_dim": WIDTH, "image_token_embed_dim": WIDTH}
    return of(name, {}, vision, vq_config=vq), square()


@kind("hunyuan_vl")
def hunyuan_vl(name):
    vision = vision_config(patch_size=4, spatial_merge_size=2, out_hidden_size=WIDTH, text_hidden_size=WIDTH)
    vision |= {"num_key_value_heads": 4, "max_image_size": 64, "img_max_token_num": 256}
    return of(name, mrope([2, 2, 2, 2]), vision, im_start_id=186, im_end_id=187, im_newline_id=185), patches(48)


@kind("lighton_ocr", "mistral3")
def lighton_ocr(name):
    def picture(number, generator):
        return {name: rows[number % 3 :] for name, rows in tiny.pixtral_pixels(number % 3 + 1, generator).items()}

    vision = {**vision_config(image_size=48), "model_type": "pixtral", "head_dim": 8}
    return of(name, {}, vision, spatial_merge_size=2), picture


@kind("kimi_k25")
def kimi_k25(name):
    vision = vision_config(patch_size=4, pos_emb_height=8, pos_emb_width=8, merge_kernel_size=[2, 2])
    return of(name, {**LATENT, **EXPERTS, "head_dim": 8}, vision, projection_hidden_size=32), patches(48, 3, 4, 4)


LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 8}
LATENT |= {"num_key_value_heads": 4}


@kind("minicpmv4_6", "minicpmv4_7", "minicpm_ocr")
def minicpm(name):
    vision = vision_config(patch_size=4, insert_layer_id=1, image_size=48)
    text = {name: value for name, value in tiny.hybrid_text().items() if name != "rope_parameters"}

    def picture(number, generator):
        size = torch.tensor([GRIDS[number % len(GRIDS)][1:]])
        return {"pixel_values": torch.randn(1, 3, 4, int(size.prod()) * 4, generator=generator), "target_sizes": size}

    return of(name, text, vision, insert_layer_id=1, patch_size=4), picture


@kind("molmo2")
def molmo2(name):
    vision = vision_config(image_size=[24, 24], num_position_embeddings=16, num_key_value_heads=4, head_dim=8)
    text = {"additional_vocab_size": 8}
    adapter = {"vision_feature_layer": [2, 1], "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
    adapter |= {"head_dim": 8, "intermediate_size": 48, "text_hidden_size": WIDTH}
    ids = {"image_patch_id": IMAGE_ID, "image_start_token_id": 186, "low_res_image_start_token_id": 185}
    ids |= {"image_end_token_id": 187, "frame_start_token_id": 184, "frame_end_token_id": 183}

    def picture(number, generator):
        cells = torch.arange(16).view(2, 2, 2, 2).permute(0, 2, 1, 3).reshape(4, 4)  # 2 x 2 patches are a token
        found = {"pixel_values": torch.randn(1, 16, 108, generator=generator), "image_token_pooling": cells}
        return {
            **found,
            "image_grids": torch.tensor([[2, 2, 0, 0]]),
            "image_num_crops": torch.ones(1, dtype=torch.long),
        }

    return of(name, text, vision, adapter_config=adapter, video_token_id=IMAGE_ID, **ids), picture


@kind("cosmos3_edge")
def cosmos3_edge(name):
    vision = vision_config(patch_size=4, num_patches=144, spatial_merge_size=2)
    return of(name, mrope([4, 2, 2]), vision, projector_hidden_size=64), patches(48)


@kind("cohere_compass")
def cohere_compass(name):
    vision = {**QWEN, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    text = {
        **SLIDING,
        "rope_parameters": {"sliding_attention": {**ROPE, "mrope_section": [4, 2, 2]}, "full_attention": None},
    }
    return of(name, text, vision), patches(96)


@kind("muse_glimmer", "muse_spark")
def muse(name):
    vision = vision_config(patch_size=4, pos_emb_height=8, pos_emb_width=8, layer_types=["full_attention"] * 3)
    text = {**SLIDING, **EXPERTS}
    text |= {"layer_rope_theta": [10000.0, 0] * 2, "mlp_layer_types": ["sparse"] * 4, "moe_hidden_size": 32}
    audio = {"audio_config": {"depths": [1] * 4, "hidden_sizes": [16] * 4, "out_hidden_size": WIDTH}}
    top = {**(audio if name == "muse_spark" else {}), "out_hidden_size": 128, "projector_hidden_size": 48}
    return of(name, text, vision, **top), patches(96)


@kind("granite_docling")
def granite_docling(name):
    vision = vision_config(out_hidden_size=WIDTH, scale_factor=2, deepstack_visual_indexes=[0, 1])
    real = torch.ones(1, 1, dtype=torch.bool)
    return of(name, {}, vision), square(24, 1, pixel_attention_mask=real)


@kind("lfm2_vl")
def lfm2_vl(name):
    vision = {**vision_config(num_patches=16, vision_use_head=False), "model_type": "siglip2_vision_model"}
    text = {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8}

    def picture(number, generator):
        rows = torch.randn(1, 16, 108, generator=generator)
        shape, real = torch.tensor([[4, 4]]), torch.ones(1, 16, dtype=torch.long)
        return {"pixel_values": rows, "spatial_shapes": shape, "pixel_attention_mask": real}

    return of(name, text, vision, downsample_factor=2, projector_hidden_size=48), picture


@kind("lfm3_vl")
def lfm3_vl(name):
    vision = vision_config(patch_size=4, spatial_merge_size=2, temporal_patch_size=2, num_key_value_heads=2)
    vision["layer_types"] = ["conv", "full_attention", "full_attention"]
    text = {"layer_types": ["conv", "full_attention", "conv", "sliding_attention"], "sliding_window": 14}
    return of(name, text, vision, projector_hidden_size=48), patches(96)


@kind("emu3")
def emu3(name):
    vq = {"codebook_size": 16, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "num_res_blocks": 1}
    vq |= {"channel_multiplier": [1, 2], "hidden_size": 64, "attn_resolutions": [], "temporal_downsample_factor": 1}
    words = {"<|extra_200|>": 180, "<image>": IMAGE_ID}
    words |= {f"<|visual token {i:06d}|>": 100 + i for i in range(16)}
    size = torch.tensor([[24, 24]])
    return of(name, {}, vq_config=vq, vocabulary_map=words), square(image_sizes=size)


@kind("video_llava")
def video_llava(name):
    vision = {**vision_config(), "model_type": "clip_vision_model"}
    ids = {"image_token_index": IMAGE_ID, "video_token_index": VIDEO_ID}
    return of(name, {}, vision, **ids), square()


@kind("step3p7")
def step3p7(name):
    text = {**EXPERTS, "share_expert_dim": 32, "query_pre_attn_scalar": 16, **SLIDING, "num_sliding_attention_heads": 4}
    text["rope_parameters"] = dict.fromkeys(("full_attention", "sliding_attention"), ROPE)
    return of(name, text, vision_config(image_size=48), mm_tokens_per_image=4), square(48)


@kind("deepseek_ocr2")
def deepseek_ocr2(name):
    encoder = text_config(hidden_size=32, head_dim=8, num_hidden_layers=2)
    vision = {"sam_config": {**SAM, "downsample_channels": [24, 32], "scale": 8}, "encoder_config": encoder}
    return of(name, {**EXPERTS, "topk_group": None, "n_group": None}, vision), square(64)


@kind("dots3_note")
def dots3_note(name):
    text = {**LATENT, **EXPERTS, "index_topk": 8, "index_head_dim": 16, "index_n_heads": 16, "sliding_window": 14}
    text |= {"layer_types": ["indexed_attention", "sliding_attention"] * 2, "shared_experts_intermediate_size": 32}
    small = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "head_dim": 16}
    small |= {"qk_nope_head_dim": 8, "v_head_dim": 16}
    text |= {f"swa_{name}": value for name, value in small.items()}
    vision = vision_config(patch_size=4, spatial_merge_size=2, moe_intermediate_size=16, num_local_experts=2)
    vision |= {"mlp_layer_types": ["dense"] * 3, "adapter_in_dim": 32, "adapter_out_dim": WIDTH}
    audio = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    audio |= {"num_key_value_heads": 2, "head_dim": 16, "downsample_hidden_size": 16, "adapter_out_dim": WIDTH}
    audio["adapter_input_size"] = 32
    return of(name, text, vision, audio_config=audio, audio_token_id=192), patches(48)


@kind("gemma4", "gemma4_unified")
def gemma4(name):
    text = {**SLIDING}
    text |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": tiny.VOCAB}
    text |= (
        {
            "num_hidden_layers": 6,
            "layer_types": SLIDING["layer_types"] + SLIDING["layer_types"][:2],
            "num_kv_shared_layers": 2,
        }
        if name == "gemma4"
        else {}
    )
    vision = vision_config(patch_size=4, pooling_kernel_size=2, position_embedding_size=32, head_dim=8)
    vision |= {"num_key_value_heads": 4, "mm_embed_dim": WIDTH, "mm_posemb_size": 32}
    vision["model_type"] = f"{name}_vision"
    if name == "gemma4_unified":
        vision["output_proj_dims"] = WIDTH

    width = 192 if name == "gemma4_unified" else 48

    def picture(number, generator):
        grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).view(1, 16, 2)
        return {"pixel_values": torch.rand(1, 16, width, generator=generator), "image_position_ids": grid}

    return of(name, text, vision), picture


@kind("mistral_large4")
def mistral_large4(name):
    text = {**LATENT, **EXPERTS, "index_topk": 64, "index_head_dim": 16, "index_n_heads": 4}
    text |= {"kv_source_layers": [0, 1, 2, 2], "no_rope_layers": [1, 0, 1, 1]}
    vision = {**vision_config(image_size=48), "model_type": "pixtral", "head_dim": 8}

    def picture(number, generator):
        return {name: rows[number % 3 :] for name, rows in tiny.pixtral_pixels(number % 3 + 1, generator).items()}

    return of(name, text, vision, spatial_merge_size=2, vision_feature_layer=-1), picture


@kind("nemotron_h_omni")
def nemotron_h_omni(name):
    text = {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "mamba_num_heads": 4}
    text |= {"mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8, "use_mamba_kernels": False}
    text |= {**EXPERTS, "moe_shared_expert_intermediate_size": 32}
    vision = vision_config(patch_size=4, image_size=48, max_img_size=64, mlp_ratio=2.0, patch_dim=48)
    vision |= {"video_patch_dim": 96, "num_cls_tokens": 1, "num_registers": 1}
    vision["video_temporal_patch_size"] = 2

    def picture(number, generator):
        grid = torch.tensor([GRIDS[number % len(GRIDS)][1:]])
        rows = torch.randn(int(grid.prod()), 48, generator=generator)
        return {"pixel_values": rows, "image_grid_hw": grid}

    return of(name, text, vision, vision_hidden_size=32, projector_hidden_size=48), picture


@kind("fuyu")
def fuyu(name):
    def picture(number, generator):
        return {"pixel_values": torch.randn(1, 9, 3 * 16, generator=generator)}

    return of(name, {"model_type": "persimmon"}, patch_size=4, image_size=12), picture


@kind("gemma3n")
def gemma3n(name):
    text = {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 14}
    text |= {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": tiny.VOCAB}
    text |= {"laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 6, "intermediate_size": [96] * 6}
    vision = {"model_type": "gemma3n_vision", "architecture": "test_resnet", "hidden_size": 96}
    audio = {"hidden_size": 32, "conf_num_hidden_layers": 1, "conf_num_attention_heads": 2}
    return of(name, text, vision, audio_config=audio, vision_soft_tokens_per_image=4), square(64)


@kind("fast_vlm")
def fast_vlm(name):
    vision = {"model_type": "timm_wrapper", "architecture": "test_resnet", "hidden_size": 96, "do_pooling": True}
    return of(name, {}, vision, image_token_index=IMAGE_ID), square(128)


@kind("perception_lm")
def perception_lm(name):
    args = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 64, "global_pool": ""}
    vision = {"model_type": "timm_wrapper", "architecture": "test_vit", "model_args": args, "hidden_size": 64}
    return of(name, {}, vision, vision_use_cls_token=True, projector_pooling_ratio=1), square(64, 1)


# ---------------------------------------------------------------------------------- types with an adapter of their own
@kind("llama4")
def llama4(name):
    text = {"attention_chunk_size": 14, "layer_types": ["chunked_attention", "full_attention"] * 2}
    text |= {"no_rope_layers": [1, 0] * 2, "num_local_experts": 4, "interleave_moe_layer_step": 2}
    text |= {"intermediate_size_mlp": 64}
    vision = vision_config(vision_output_dim=48, projector_input_dim=48, projector_output_dim=48)
    vision["intermediate_size"] = 128  # what 2 x 2 patches of the tower are together
    return of(name, text, vision, boi_token_index=186, eoi_token_index=187, image_token_index=IMAGE_ID), square()


@kind("granite4_vision")
def granite4_vision(name):
    vision = {**vision_config(hidden_size=64), "model_type": "siglip_vision_model"}
    qformer = {"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 48, "vocab_size": 8}
    top = {"qformer_config": qformer, "downsample_rate": "1/2", "image_grid_pinpoints": tiny.PINPOINTS}
    top |= {"deepstack_layer_map": [[-1, 0], [1, 2]], "spatial_target_layers": [1, 3, 1, 3], "image_seq_length": 4}
    text = {"embedding_multiplier": 2.0, "logits_scaling": 2.0}

    def picture(number, generator):
        size = tiny.ANYRES_SIZES[number % len(tiny.ANYRES_SIZES)]
        views = image_size_to_num_patches(list(size), tiny.PINPOINTS, tiny.SIDE)
        pixels = torch.zeros(1, 5, 3, tiny.SIDE, tiny.SIDE)
        pixels[:, :views] = torch.randn(1, views, 3, tiny.SIDE, tiny.SIDE, generator=generator)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([size])}

    top |= {"vision_feature_select_strategy": "full", "image_token_index": IMAGE_ID}
    return of(name, text, vision, **top), picture


@kind("qwen4_exp")
def qwen4_exp(name):
    text = {**tiny.hybrid_text(), **EXPERTS, **mrope([4, 2, 2], mrope_interleaved=True)}
    text |= {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8}
    text |= {"indexer_compress_ratio": 2, "hc_count": 2, "hc_lowrank": 8, "ple_layer_ids": [1, 3], "ple_embed_dim": 16}
    text |= {"heads_per_ngram": 2, "ngram_vocab_size_base": 50, "make_ngram_vocab_size_divisible_by": 1}
    text |= {"layer_types": ["linear_attention", "indexed_attention"] * 2, "split_ngram_parts": 1}
    return of(name, text, {**QWEN, "num_position_embeddings": 64}), patches(96)


@kind("blip-2", "instructblip", "instructblipvideo")
def blip(name):
    text = {"model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": WIDTH, "do_layer_norm_before": True}
    qformer = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    qformer |= {"encoder_hidden_size": 32, "vocab_size": tiny.VOCAB}
    top = {"qformer_config": qformer, "num_query_tokens": 6, "image_token_index": IMAGE_ID}
    top |= {"video_token_index": VIDEO_ID} if name == "instructblipvideo" else {}

    def picture(number, generator):
        shape = (1, 2, 3, tiny.SIDE, tiny.SIDE) if name == "instructblipvideo" else (1, 3, tiny.SIDE, tiny.SIDE)
        found = {"pixel_values": torch.randn(shape, generator=generator)}
        if name != "blip-2":
            found["qformer_input_ids"] = torch.randint(10, 90, (1, 5), generator=generator)
            found["qformer_attention_mask"] = torch.ones(1, 5, dtype=torch.long)
        return found

    return of(name, text, vision_config(), **top), picture


@kind("inkling_mm_model")
def inkling(name):
    text = {**EXPERTS, "layer_types": ["hybrid_sliding", "hybrid"] * 2, "sliding_window_size": 6, "rel_extent": 8}
    text |= {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "d_rel": 4}
    text |= {"log_scaling_n_floor": 4, "mlp_layer_types": ["dense", "sparse"] * 2, "conv_kernel_size": 3}
    vision = {"patch_size": 4, "temporal_patch_size": 2, "hidden_size": 32, "num_hidden_layers": 2}
    audio = {"n_mel_bins": 4, "mel_vocab_size": 8}

    def picture(number, generator):
        return {"pixel_values": torch.randn([9, 6, 12][number % 3], 2, 4, 4, 3, generator=generator)}

    return of(name, text, vision, audio_config=audio, audio_token_id=192), picture


@kind("inkling2")
def inkling2(name):
    text = {**EXPERTS, "layer_types": ["hybrid_sliding", "hybrid"] * 2, "sliding_window_size": 6, "rel_extent": 8}
    text |= {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "d_rel": 4}
    text |= {"log_scaling_n_floor": 4, "conv_kernel_size": 3, "n_layers_per_attn_res_block": 2}
    text |= {"unpadded_vocab_size": tiny.VOCAB}
    vision = vision_config(patch_size=4, posemb_grid_size=8, projection_hidden_dim=48, text_hidden_size=WIDTH)
    return of(name, text, vision), patches(192, 8, 8, 3)


@kind("minimax_m3_vl")
def minimax_m3(name):
    text = {**EXPERTS, "layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "dense_intermediate_size": 48}
    text |= {"shared_intermediate_size": 32, "rotary_dim": 8, "index_n_heads": 2, "index_head_dim": 16}
    text |= {"index_block_size": 4, "index_topk_blocks": 2}
    vision = vision_config(patch_size=4)
    ids = {"image_token_index": IMAGE_ID, "video_token_index": VIDEO_ID}
    return of(name, text, vision, **ids, projector_hidden_size=48), patches(96)


@kind("glm5_next")
def glm5_next(name):
    text = {**EXPERTS, **LATENT, "qk_rope_head_dim": 0, "head_dim": 0, "hc_mult": 2, "linear_num_heads": 4}
    text |= {"linear_head_dim": 8, "layer_types": ["linear_attention", "indexed_attention"] * 2, "index_topk": 8}
    text |= {"index_head_dim": 16, "index_n_heads": 16, "index_kpool": 4, "hc_sinkhorn_iters": 2}
    ids = {"image_start_token_id": 186, "image_end_token_id": 187, "video_start_token_id": 188}
    vision = {**QWEN, "projection_intermediate_size": 64}
    return of(name, text, vision, **ids, video_end_token_id=189), patches(96)


# -------------------------------------------------------------------------------------------------------------- refused
INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 64}
CHANGES = {
    "chameleon": {"vocabulary_map": {"<image>": 3}},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}},
}
"""What the usual configuration of a type lacks."""


def unserved() -> list[str]:
    """Image-text-to-text types of the installed transformers that no adapter names."""
    return sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - set(families()))


def refusal(name: str) -> str:
    """The sentence with which the model of a type, of its usual size and without storage, is refused."""
    config = CONFIG_MAPPING[name](**CHANGES.get(name, {}))
    with torch.device("meta"):
        model = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config)
    with pytest.raises(TypeError) as caught:
        vtoken.wrap(model, "random", keep=0.5)
    return str(caught.value)


# --------------------------------------------------------------------------------------------------------------- oracle
@contextlib.contextmanager
def oracle(adapter: Adapter, plan: TestReducer, visual: Tensor, real: Tensor, lengths: list[int] | None = None):
    """`hidden_oracle`, or `short_oracle` for types in which dropping means a shorter prompt."""
    family = adapter.model.config.model_type
    with (short_oracle if family in SHORT else hidden_oracle)(adapter, plan, visual, real, lengths):
        yield


@contextlib.contextmanager
def short_oracle(adapter: Adapter, plan: TestReducer, visual: Tensor, real: Tensor, lengths: list[int] | None):
    """The stock language model on a prompt without the dropped tokens, with positions counted anew."""
    assert plan.before is not None
    assert not plan.at

    def cut(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        embeds = kwargs["inputs_embeds"]
        there = torch.cat([real, real.new_ones(len(real), embeds.shape[1] - real.shape[1])], 1)
        for row, runs in enumerate(runs_of(visual, lengths)):
            for run in runs:
                scores = content_score(embeds[row, run])
                number = int((torch.tensor(float(len(run))) * plan.before).round())
                there[row, run[scores.sort(descending=True, stable=True).indices[number:]]] = False
        width = int(there.sum(1).max())
        short, mask = embeds.new_zeros(len(embeds), width, embeds.shape[2]), there.new_zeros(len(there), width)
        for row, keep in enumerate(there):
            number = int(keep.sum())
            short[row, width - number :], mask[row, width - number :] = embeds[row, keep], True
        ids = (mask.cumsum(1) - 1).clamp(min=0)
        return args, {**kwargs, "inputs_embeds": short, "attention_mask": mask.long(), "position_ids": ids}

    handle = adapter.language_model.register_forward_pre_hook(cut, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def hidden_oracle(adapter: Adapter, plan: TestReducer, visual: Tensor, real: Tensor, lengths: list[int] | None = None):
    """`masked_oracle`, in which a recurrent layer sees the rows that are left, one batch row at a time."""
    recurrent = [layer for layer in adapter.layers if not adapter.has_attention(layer)]
    with masked_oracle(adapter.language_model, plan, visual, real, lengths) as state:
        for layer in recurrent:
            layer.forward = functools.partial(absent, layer.forward, state)
        try:
            yield
        finally:
            for layer in recurrent:
                del layer.forward


def absent(forward: Callable, state: dict[str, Tensor], hidden: Tensor, **kwargs: Any) -> Tensor:
    """A layer on the rows of ``state["valid"]`` alone; the others come out as zeros, which nothing looks at."""
    out = torch.zeros_like(hidden)
    given = {name: value for name, value in kwargs.items() if name not in ("past_key_values", "cache")}
    for row, valid in enumerate(state["valid"]):
        keep = valid.nonzero()[:, 0]
        cut = {name: one_row(value, row, keep, valid.shape) for name, value in given.items()}
        cut |= {name: None for name in ("position_ids", "attention_mask", "past_key_values", "cache") if name in kwargs}
        if given.get("position_embeddings") is not None:
            cut["position_embeddings"] = [table[..., :, keep, :] for table in given["position_embeddings"]]
        if "conv_mask" in given:
            cut["conv_mask"] = None
        out[row, keep] = forward(hidden[row : row + 1, keep], **cut)[0]
    return out


def one_row(value: Any, row: int, keep: Tensor, shape: torch.Size) -> Any:
    """An argument of a layer that has a number for each token, as it would be for the tokens of one row alone."""
    if isinstance(value, Tensor) and value.dim() == 2 and value.shape[1:] == shape:
        return value[row : row + 1, keep]
    return value


# --------------------------------------------------------------------------------------------------------------- inputs
@dataclass
class Case:
    """A tiny model, the inputs of a left-padded batch, and what its processor would give for each picture."""

    model: nn.Module
    inputs: dict[str, Tensor]
    pictures: list[dict[str, Tensor]]
    counts: tuple[int, ...]

    def alone(self, row: int) -> dict[str, Tensor]:
        """The inputs of one row without its padding and with its own pictures."""
        at = self.inputs["attention_mask"][row].bool()
        first, last = sum(self.counts[:row]), sum(self.counts[: row + 1])
        rowwise = {name: self.inputs[name][row : row + 1, at] for name in ROWWISE & self.inputs.keys()}
        return {**rowwise, **joined(self.pictures[first:last])}


@functools.cache
def make(name: str, images_per_row: tuple[int, ...] = (1,), seed: int = 0, attn: str = "sdpa") -> Case:
    """A tiny model in eval mode and inputs with ``images_per_row[b]`` images in row b."""
    if name in tiny.HYBRID:  # they have an adapter of their own, and are compared as the others are
        return Case(*tiny.make(name, images_per_row, seed, attn), [], images_per_row)
    if name in TIMM:
        pytest.importorskip("timm")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    model, picture = BUILDERS[name]()
    settle(model, generator, "eager" if name in EAGER else attn)
    pictures = [picture(number, generator) for number in range(sum(images_per_row))]
    lengths = [features(model, found) for found in pictures]
    inputs = {**assemble(image_rows(lengths, images_per_row), generator), **joined(pictures)}
    if name in CLIPS_ONLY:
        inputs["input_ids"].masked_fill_(inputs["input_ids"] == IMAGE_ID, VIDEO_ID)
    for types in TOKEN_TYPES & inspect.signature(model.forward).parameters.keys():
        inputs[types] = (inputs["input_ids"] == IMAGE_ID).long()
    if name == "llama4" and tiny.VERSION >= (5, 24):
        try:
            model(**inputs)
        except AttributeError as error:  # 5.24.0 reads an output's image_outputs, which it does not have
            pytest.skip(f"the unwrapped model fails in transformers {transformers.__version__}: {error}")
    return Case(model, inputs, pictures, images_per_row)


SLIDERS = ("cohere_compass", "dots3_note", "exaone4_5", "gemma3n", "gemma4", "gemma4_unified", "lfm3_vl")
SLIDERS += ("muse_glimmer", "muse_spark", "shieldgemma2", "step3p7")
DYNAMIC = dict.fromkeys(SLIDERS, "sliding window of 14 tokens")
DYNAMIC |= dict.fromkeys(("inkling_mm_model", "inkling2"), "sliding window of 6 tokens")
DYNAMIC |= {"hyperclovax_vision_v2": "counts positions by the cache", "llama4": "chunks of 14 tokens"}
"""Types that refuse static caches, and why: windows that are shorter than the prompts, or positions."""
ONE_TURN = dict.fromkeys(SLIDERS, "sliding window of 14 tokens") | {"llama4": "chunks of 14 tokens"}
"""Types that refuse a further prompt on a pruned cache, and why."""
CLIPS = dict.fromkeys(("glm4v", "glm46v", "glm4v_moe", "glm_ocr"), IMAGE_ID)
CLIPS |= dict.fromkeys(("cohere_compass", "cosmos3_omni", "exaone4_5", "hyperclovax_vision_v2", "lfm3_vl"), VIDEO_ID)
CLIPS |= dict.fromkeys(("muse_glimmer", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "video_llama_3"), VIDEO_ID)
CLIPS["qwen4_exp"] = VIDEO_ID
"""Types whose clips are tested, and the placeholder that they stand behind."""
CLIPS_ONLY = ("instructblipvideo",)
"""Types that take no pictures, only clips."""
CLIP_TOKENS = 24


def clips(name: str) -> Case:
    """A batch of two prompts with a clip of three steps each, before every one of which stands text."""
    case, generator = make(name, (1,)), torch.Generator().manual_seed(5)
    steps = [2, torch.full((CLIP_TOKENS // 3,), CLIPS[name])] * 3
    inputs = assemble([[n, torch.tensor([188]), *steps, torch.tensor([189]), 7] for n in (4, 2)], generator)
    width = case.inputs["pixel_values"].shape[1]
    inputs["pixel_values_videos"] = torch.randn(2 * 3 * 4 * 8, width, generator=generator)
    inputs["video_grid_thw"] = torch.tensor([[3, 4, 8]] * 2)
    if "image_merge_sizes" in case.inputs:
        inputs["video_merge_sizes"] = torch.tensor([2, 2])
    for types in TOKEN_TYPES & case.inputs.keys():
        inputs[types] = 2 * (inputs["input_ids"] == CLIPS[name]).long()
    return Case(case.model, inputs, [], (0, 0))


def longer(model: nn.Module, inputs: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """`extended`, without positions where a model would give them to its Q-Former too; it counts them by the mask."""
    out = extended(model, inputs, tokens)
    if model.config.model_type in PICTURED:
        del out["position_ids"]
    return out


def positions(name: str) -> dict[str, str]:
    """Options of `vtoken.wrap` that a type needs."""
    return {"positions": "compact"} if name in COMPACT else {}


def batch(name: str, *images_per_row: int) -> tuple[int, ...]:
    """Pictures in the rows of a batch of a type."""
    return images_per_row[:1] if name in UNPADDED else images_per_row


def next_turn(inputs: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """``inputs`` that go on with text up to ``ids`` (B, L), without pictures."""
    more = ids.shape[1] - inputs["input_ids"].shape[1]
    out = {"input_ids": ids}
    for name in ROWWISE & inputs.keys() - {"input_ids"}:
        value = 1 if name == "attention_mask" else 0
        out[name] = torch.nn.functional.pad(inputs[name], (0, more), value=value)
    return out


def eager_rows(case: Case, block: nn.Module) -> Tensor:
    """(B, H, Q, K) attention weights of a module of the stock model under eager attention."""
    before = block.config._attn_implementation
    case.model.set_attn_implementation("eager")
    try:
        return eager_weights(block, lambda: case.model(**case.inputs))[0]
    finally:
        case.model.set_attn_implementation(before)


def joined(pictures: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The arguments of several pictures as those of one call."""
    out = {}
    for name in pictures[0] if pictures else ():
        parts = [picture[name] for picture in pictures]
        if name == "image_token_pooling":  # counts the patches of all pictures
            parts = [part + 16 * number for number, part in enumerate(parts)]
        out[name] = torch.cat(parts, -1 if name == "pixel_values" and "target_sizes" in pictures[0] else 0)
    return out


def features(model: nn.Module, picture: dict[str, Tensor]) -> int:
    """Visual tokens that the model makes of a picture."""
    outer = find_outer(model)
    method = outer.get_image_features if hasattr(outer, "get_image_features") else outer.get_video_features
    names = inspect.signature(method).parameters
    with torch.no_grad():
        found = method(**{name: value for name, value in picture.items() if name in names}, return_dict=True)
    return sum(map(len, feature_list(found)))


def settle(model: nn.Module, generator: torch.Generator, attn: str) -> None:
    """Make biases, norms and newlines not trivial, and generation greedy."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or not parameter.any():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.set_attn_implementation(attn)
    model.eval()
    config = model.generation_config
    config.pad_token_id, config.eos_token_id, config.bos_token_id = tiny.PAD, None, 1
