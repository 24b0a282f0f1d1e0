# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints with tokenizer and processor of the stock classes, saved as the hub has them."""

from __future__ import annotations

import string

import tiny
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from vtoken.mini.model import build_model, build_processor

SPECIAL = {
    tiny.PAD: "<pad>",
    1: "<s>",
    tiny.IMAGE_ID: "<|image_pad|>",
    tiny.VIDEO_ID: "<|video_pad|>",
    tiny.VISION_START: "<|vision_start|>",
    tiny.VISION_END: "<|vision_end|>",
    196: "<|im_start|>",
    197: "<|im_end|>",
    tiny.EOS: "<|endoftext|>",
}
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nDefault.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% elif part['type'] == 'video' %}VIDEO"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_TEMPLATE = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>").replace(
    "VIDEO", "<|vision_start|><|video_pad|><|vision_end|>"
)
INTERN_TEMPLATE = TEMPLATE.replace("IMAGE", "<|image_pad|>\n").replace("VIDEO", "<|video_pad|>\n")


def tokenizer(**extra):
    """One token a character."""
    vocab = {token: i for i, token in SPECIAL.items()}
    letters = string.ascii_letters + string.digits + string.punctuation + " \n"
    free = (i for i in range(2, 188) if i not in SPECIAL)
    vocab |= {letter: next(free) for letter in letters}
    vocab |= {chr(0x0400 + i): i for i in free}  # every id can be generated and decoded
    vocab |= {chr(0x0500 + i): i for i in range(188, tiny.VOCAB) if i not in SPECIAL}
    core = Tokenizer(models.WordLevel(vocab, unk_token=" "))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    special = list(SPECIAL.values())
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=special,
        **extra,
    )


def qwen(name: str, patch: int):
    """A Qwen model with the patch size of the released ones, so that the stock wrapper's pixel limits apply."""
    processors = {
        "qwen2_vl": (tf.Qwen2VLProcessor, tf.Qwen2VLVideoProcessor),
        "qwen2_5_vl": (tf.Qwen2_5_VLProcessor, tf.Qwen2VLVideoProcessor),
        "qwen3_vl": (tf.Qwen3VLProcessor, tf.Qwen3VLVideoProcessor),
    }
    config = tiny.make(name)[0].config
    config.vision_config.patch_size = patch
    if name == "qwen2_5_vl":
        config.vision_config.window_size = 8 * patch
    kind, clips = processors[name]
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    sizes = {"patch_size": patch, "temporal_patch_size": config.vision_config.temporal_patch_size, "merge_size": 2}
    images, videos = tf.Qwen2VLImageProcessor(size=size, **sizes), clips(size=size, **sizes)
    words = tokenizer()
    return config, kind(image_processor=images, tokenizer=words, video_processor=videos, chat_template=QWEN_TEMPLATE)


def internvl():
    """InternVL with tiles of 24 x 24 pixels."""
    config = tiny.make("internvl")[0].config
    names = {"start_image_token": "<|vision_start|>", "end_image_token": "<|vision_end|>"}
    names |= {"context_image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    side = {"height": tiny.SIDE, "width": tiny.SIDE}
    processor = tf.InternVLProcessor(
        image_processor=tf.GotOcr2ImageProcessor(size=side, crop_to_patches=True, max_patches=3),
        tokenizer=tokenizer(extra_special_tokens=names),
        video_processor=tf.InternVLVideoProcessor(size=side),
        image_seq_length=4,
        chat_template=INTERN_TEMPLATE,
    )
    return config, processor


def save_checkpoint(name: str, folder):
    """A checkpoint of the family ``name`` in ``folder``, with random weights in bfloat16."""
    if name == "llava":
        build_model().save_pretrained(folder)
        build_processor().save_pretrained(folder)
        return folder
    config, processor = internvl() if name == "internvl" else qwen(name, 16 if name == "qwen3_vl" else 14)
    model = tf.AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id = [197, tiny.EOS]
    model.generation_config.pad_token_id = tiny.PAD
    model.bfloat16().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
