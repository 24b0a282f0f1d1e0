# SPDX-License-Identifier: Apache-2.0
"""The embedded LLaVA before training: stock classes, small sizes, and a word-level tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vtoken.mini.questions import LETTER_TOKENS, WORDS
from vtoken.mini.world import IMAGE, PATCH

WIDTH = 128  # of the tower and of the decoder
PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
IMAGE_TOKEN, USER, ASSISTANT = "<image>", "<user>", "<assistant>"
SPECIAL = [PAD, BOS, EOS, UNK, IMAGE_TOKEN, USER, ASSISTANT]
VOCAB = {token: i for i, token in enumerate([*SPECIAL, *WORDS, *LETTER_TOKENS])}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<user>' if message['role'] == 'user' else '<assistant>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% if message['role'] != 'user' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words are tokens; anything else is spelled letter by letter (``cat`` -> ``c ##a ##t``)."""
    core = Tokenizer(models.WordPiece(VOCAB, unk_token=UNK, max_input_chars_per_word=64))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=[IMAGE_TOKEN, USER, ASSISTANT],
        padding_side="left",
    )


def build_processor() -> LlavaProcessor:
    """Tokenizer and image processor of the embedded LLaVA."""
    image_processor = CLIPImageProcessor(
        size={"height": IMAGE, "width": IMAGE},
        crop_size={"height": IMAGE, "width": IMAGE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def decoder_sizes(vocabulary: Mapping[str, int], positions: int = 4096) -> dict[str, Any]:
    """Arguments of a decoder's configuration; all embedded models have decoders of one size."""
    return {
        "vocab_size": len(vocabulary),
        "hidden_size": WIDTH,
        "intermediate_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": positions,
        "bos_token_id": vocabulary[BOS],
        "eos_token_id": vocabulary[EOS],
        "pad_token_id": vocabulary[PAD],
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
    }


def clip_tower(side: int) -> CLIPVisionConfig:
    """A CLIP tower of width 128 and 6 layers for pictures of ``side`` pixels."""
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=side,
        patch_size=PATCH,
        hidden_act="gelu",
    )


def name_ends(model: Any, vocabulary: Mapping[str, int]) -> Any:
    """Tell ``generate`` the model's padding, first and last token; returns the model."""
    for name, token in {"pad": PAD, "bos": BOS, "eos": EOS}.items():
        setattr(model.generation_config, f"{name}_token_id", vocabulary[token])
    return model


def build_model(seed: int = 0) -> LlavaForConditionalGeneration:
    """An untrained embedded LLaVA: CLIP tower 128 x 6 with [CLS], two-layer projector, Llama decoder 128 x 6."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=clip_tower(IMAGE),
        text_config=LlamaConfig(**decoder_sizes(VOCAB, positions=2048)),
        image_token_index=VOCAB[IMAGE_TOKEN],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    return name_ends(LlavaForConditionalGeneration(config), VOCAB)
