# SPDX-License-Identifier: Apache-2.0
"""From a conversation to model inputs: as the checkpoint's processor does it, or exactly as lmms-eval's wrappers do.

Scores move by points with the resizing of a picture, a system prompt or the rounding of bfloat16. ``"checkpoint"`` is
what a user of the model gets; ``"lmms_eval"`` is comparable with numbers that the stock wrappers of lmms-eval gave.
Which wrapper does what is written down from lmms-eval 0.7.3 and tested against it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vtoken.compat import chat_inputs
from vtoken.eval.errors import EvalError, MissingExtraError, unknown
from vtoken.eval.model.generation import DEFAULT_MAX_NEW_TOKENS

PRESETS = ("checkpoint", "lmms_eval")
FRAMES = 32  # of a clip, in all stock wrappers
PIXELS = {"min_pixels": 256 * 28 * 28, "max_pixels": 1605632}  # of a picture, in the stock wrappers of newer Qwens

Conversation = list[dict[str, Any]]


@dataclass(frozen=True)
class Preprocessing:
    """The checkpoint's own processor and chat template.

    Parameters
    ----------
    dtype : str
        Of the weights where the caller leaves it at "auto".
    max_new_tokens : int
        Where neither the task nor the caller says it.
    stop_strings : bool
        Whether an answer ends where the task's ``until`` says; several stock wrappers ignore it.
    tokenizer_eos : bool
        Whether only the tokenizer's end token ends an answer, not those of the checkpoint's generation config.
    processor : mapping
        Arguments of ``AutoProcessor.from_pretrained``.
    """

    dtype: str = "auto"
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    stop_strings: bool = True
    tokenizer_eos: bool = False
    processor: Mapping[str, Any] = field(default_factory=dict)

    def encode(self, processor: Any, conversations: Sequence[Conversation]) -> Any:
        """Model inputs of a left-padded batch, on the CPU."""
        return chat_inputs(processor, conversations, padding=True, return_tensors="pt")


@dataclass(frozen=True)
class StockWrapper(Preprocessing):
    """`llava_hf` and `internvl_hf` of lmms-eval: text by the template, media in the order of the conversation.

    Parameters
    ----------
    call : mapping
        Further arguments of the processor's call.
    """

    stop_strings: bool = False
    tokenizer_eos: bool = True
    call: Mapping[str, Any] = field(default_factory=dict)

    def encode(self, processor: Any, conversations: Sequence[Conversation]) -> Any:
        texts = processor.apply_chat_template(list(conversations), tokenize=False, add_generation_prompt=True)
        images, videos = media(conversations, "image"), media(conversations, "video")
        return processor(
            images=images or None, videos=videos or None, text=texts, padding=True, return_tensors="pt", **self.call
        )


@dataclass(frozen=True)
class StockQwen(Preprocessing):
    """The Qwen wrappers of lmms-eval: pictures and clips are resized by qwen-vl-utils.

    Parameters
    ----------
    system_prompt : str
        Put before every conversation; "" leaves it to the chat template.
    jpeg : bool
        Whether pictures go through a JPEG of quality 85 first.
    utils : mapping
        Arguments of ``process_vision_info``.
    call : mapping
        Further arguments of the processor's call.
    clips : str
        ``"all"`` asks a clip for `FRAMES` frames even if it has fewer, ``"some"`` for as many as it has; ``""``: clips
        are not reproduced.
    """

    max_new_tokens: int = 128
    stop_strings: bool = False
    tokenizer_eos: bool = True
    processor: Mapping[str, Any] = field(default_factory=lambda: PIXELS)
    system_prompt: str = ""
    jpeg: bool = False
    utils: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    clips: str = "some"

    def encode(self, processor: Any, conversations: Sequence[Conversation]) -> Any:
        try:
            from qwen_vl_utils import process_vision_info
        except ImportError:
            raise MissingExtraError("The preprocessing 'lmms_eval' of Qwen models", "qwen-vl-utils", "qwen") from None
        prepared = [self._prepare(conversation) for conversation in conversations]
        texts = processor.apply_chat_template(prepared, tokenize=False, add_generation_prompt=True)
        images, clips, _ = process_vision_info(
            prepared, return_video_kwargs=True, return_video_metadata=True, **self.utils
        )
        videos, metadata = map(list, zip(*clips, strict=True)) if clips else (None, None)
        call = {**self.call, **({"video_metadata": metadata} if clips else {})}
        return processor(
            text=texts, images=images, videos=videos, padding=True, padding_side="left", return_tensors="pt", **call
        )

    def _prepare(self, conversation: Conversation) -> Conversation:
        turns = [{**turn, "content": [self._part(part) for part in turn["content"]]} for turn in conversation]
        return [{"role": "system", "content": self.system_prompt}, *turns] if self.system_prompt else turns

    def _part(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "video":
            if not self.clips:
                raise EvalError(
                    "preprocessing='lmms_eval' does not reproduce how lmms-eval samples clips for this model: "
                    "use preprocessing='checkpoint'."
                )
            return {**part, **self.processor, "nframes": FRAMES if self.clips == "all" else clip_frames(part["video"])}
        if part["type"] == "image" and self.jpeg:
            return {**part, **self.processor, "image": as_jpeg(part["image"])}
        return part


TILES = {"min_patches": 1, "max_patches": 12, "do_sample_frames": True, "num_frames": FRAMES}
POLITE = "You are a helpful assistant."
STOCK: dict[str, Preprocessing] = {
    "llava": StockWrapper(),
    "llava_next": StockWrapper(),
    "llava_onevision": StockWrapper(),
    "internvl": StockWrapper(dtype="bfloat16", call=TILES),
    "qwen2_vl": StockQwen(
        processor={"min_pixels": 3136, "max_pixels": 602112},
        system_prompt=POLITE,
        jpeg=True,
        stop_strings=True,
        clips="",
    ),
    "qwen2_5_vl": StockQwen(dtype="bfloat16"),
    "qwen3_vl": StockQwen(
        dtype="bfloat16",
        system_prompt=POLITE,
        utils={"image_patch_size": 16},
        call={"do_resize": False, "do_sample_frames": False},
        clips="all",
    ),
}
"""``config.model_type`` -> what lmms-eval's wrapper of that family does."""


def preprocessing(name: str, model_type: str) -> Preprocessing:
    """The preset ``name`` for a family.

    Raises
    ------
    EvalError
        If there is no such preset, or lmms-eval has no working wrapper of the family.
    """
    if name not in PRESETS:
        raise unknown("preprocessing", name, PRESETS)
    if name == "checkpoint":
        return Preprocessing()
    if model_type not in STOCK:
        raise EvalError(
            f"preprocessing='lmms_eval' is not known for models of type {model_type!r}, only for "
            f"{', '.join(sorted(STOCK))}: use preprocessing='checkpoint'."
        )
    return STOCK[model_type]


def media(conversations: Sequence[Conversation], kind: str) -> list[Any]:
    """All parts of a kind, in order: ``"image"``, ``"video"`` or ``"text"``."""
    parts = (part for talk in conversations for turn in talk for part in turn["content"])
    return [part[kind] for part in parts if part["type"] == kind]


def clip_frames(path: Any) -> int:
    """Frames to take of a clip: at most `FRAMES`, an even number."""
    import decord

    return max(2, min(FRAMES, len(decord.VideoReader(path))) // 2 * 2)


def as_jpeg(image: Any, quality: int = 85) -> str:
    """A picture as a ``data:`` address; the wrapper of Qwen2-VL makes one of quality 85."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
