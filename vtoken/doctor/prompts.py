# SPDX-License-Identifier: Apache-2.0
"""The prompts of an examination: two single ones that differ in length and picture, and both as a padded batch.

They come from the model's processor and drawn pictures, from the user's own inputs, or are noise of the right shape.
Owns how inputs of several prompts are put together; it knows no family.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtoken.adapters.base import Adapter
from vtoken.adapters.synthetic import synthetic_inputs
from vtoken.compat import chat_inputs
from vtoken.doctor.pictures import Box, painted, picture
from vtoken.doctor.runs import Inputs, weight_of
from vtoken.engine.encode import PIXELS

SIZES = ((448, 448), (320, 480))
"""(height, width) of the drawn pictures; the first is square, as some processors crop others."""
OF_PICTURES = ("pixel", "image", "video", "spatial", "target")
"""How the names of arguments begin that have entries for pictures, not for tokens."""
QUESTIONS = ("What is shown here?", "Name the colours of the largest shapes in this picture, one after the other.")


@dataclass(frozen=True)
class Prompts:
    """Inputs of the model's forward, on its device.

    Parameters
    ----------
    first, second : dict
        One prompt each.
    batch : dict
        Both, padded on the left.
    source : str
        Where they come from, for the report.
    paint : callable or None
        ``paint(box)`` gives the first prompt with a place of its first picture painted over.
    size : (height, width) or None
        Of that picture, in the pixels in which ``box`` is given.
    batched : bool
        Whether ``batch`` is one.
    """

    first: Inputs
    second: Inputs
    batch: Inputs
    source: str
    paint: Callable[[Box], Inputs] | None = None
    size: tuple[int, int] | None = None
    batched: bool = True

    def single(self) -> Prompts:
        """The first prompt alone, where no batch can be made of two."""
        return replace(self, second=self.first, batch=self.first, batched=False)


def prompts_of(model: Any, adapter: Adapter, inputs: Mapping[str, Any] | None, processor: Any, tokens: int) -> Prompts:
    """The prompts for a model: the user's, else the processor's, else noise.

    Raises
    ------
    ValueError
        If the inputs are of several prompts or have no picture, the processor cannot be used, or nothing is known of
        how noise for such a model must look.
    """
    if inputs is not None:
        return from_user(model, adapter, inputs)
    if processor is not None:
        return from_processor(model, processor)
    try:
        first = synthetic_inputs(model, 1, tokens, text=32)
    except NotImplementedError as error:
        raise ValueError(f"{str(error).rstrip('.')}: pass inputs= or processor=.") from None
    second = synthetic_inputs(model, 1, max(tokens // 2, 1), text=25, seed=1)
    return Prompts(first, second, join(model, [first, second]), "noise", *_tensor_painter(first))


# ------------------------------------------------------------------------------------------------------ the user's own
def from_user(model: Any, adapter: Adapter, inputs: Mapping[str, Any]) -> Prompts:
    """The user's prompt; the second one is it with other pixels and a shorter text."""
    if not isinstance(ids := inputs.get("input_ids"), Tensor) or ids.dim() != 2:
        raise ValueError("The inputs hold no input_ids of shape (1, S): pass what the model's processor returns.")
    if len(ids) != 1:
        raise ValueError(
            f"The inputs are a batch of {len(ids)} prompts: pass one prompt, of which the doctor makes batches itself."
        )
    if not any(inputs.get(name) is not None for name in pixel_names(adapter)):
        raise ValueError(f"The inputs hold no pixels ({', '.join(inputs)}): pass what the model's processor returns.")
    first = _placed(dict(inputs), model)
    first.setdefault("attention_mask", torch.ones_like(first["input_ids"]))
    second = _shorter(_other_pixels(adapter, first), adapter)
    return Prompts(first, second, join(model, [first, second]), "the caller's inputs", *_tensor_painter(first))


def pixel_names(adapter: Adapter) -> set[str]:
    """Names of the arguments that bring pictures."""
    return {*adapter.pixel_keys, *(name for names in PIXELS.values() for name in names)}


def _other_pixels(adapter: Adapter, inputs: Inputs) -> Inputs:
    return {name: other_values(value) if name in pixel_names(adapter) else value for name, value in inputs.items()}


def other_values(pixels: Any) -> Any:
    """Pixels of the same shape and about the same size that show something else; zeros, which may pad, stay."""
    if not isinstance(pixels, Tensor):
        return [other_values(part) for part in pixels]
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float32, device="cpu")
    return torch.where(pixels == 0, 0, 0.5 * noise.to(pixels.device) - 0.7 * pixels.float()).to(pixels.dtype)


def _shorter(inputs: Inputs, adapter: Adapter) -> Inputs:
    """Without three tokens of the text behind the last visual token, if there are enough."""
    ids = inputs["input_ids"]
    places = (adapter.modality(ids, None)[0] > 0).nonzero()[:, 0]
    begin = (int(places[-1]) if len(places) else 0) + 2
    if ids.shape[1] - begin < 5:
        return inputs
    keep = torch.ones(ids.shape[1], dtype=torch.bool, device=ids.device)
    keep[begin : begin + 3] = False
    return {name: value[:, keep] if _is_rowwise(name, value, ids) else value for name, value in inputs.items()}


# -------------------------------------------------------------------------------------------------------- a processor
def from_processor(model: Any, processor: Any) -> Prompts:
    """Drawn pictures and two questions, as the model's processor makes prompts of them.

    Raises
    ------
    ValueError
        If the processor takes no pictures, or its placeholder is not the model's.
    """
    check_processor(model, processor)
    pictures = [picture(*size, seed) for seed, size in enumerate(SIZES)]

    def encode(which: int, shown: Any) -> Inputs:
        return _placed(_encode(processor, [shown], QUESTIONS[which : which + 1]), model)

    first, second = (encode(which, shown) for which, shown in enumerate(pictures))

    def paint(box: Box) -> Inputs:
        return encode(0, painted(pictures[0], box))

    with _padding_left(processor):
        batch = _placed(_encode(processor, pictures, QUESTIONS), model)
    return Prompts(first, second, batch, "a drawn picture", paint, SIZES[0])


@contextlib.contextmanager
def _padding_left(processor: Any) -> Iterator[None]:
    tokenizer = processor.tokenizer
    before = tokenizer.padding_side
    tokenizer.padding_side = "left"
    try:
        yield
    finally:
        tokenizer.padding_side = before


def check_processor(model: Any, processor: Any) -> None:
    """Refuse a processor that is a tokenizer, or of another model."""
    name, wanted = type(processor).__name__, type(model).__name__
    if getattr(processor, "image_processor", None) is None:
        raise ValueError(f"{name} takes no pictures: pass the processor of {wanted}, from AutoProcessor.")
    config = model.config
    ids = [getattr(config, key, None) for key in ("image_token_id", "image_token_index")]
    known = {token for token in ids if token is not None}
    own = getattr(processor, "image_token_id", None)
    if isinstance(own, int) and known and own not in known:
        raise ValueError(
            f"{name} does not fit {wanted}: its placeholder for pictures is token {own}, the model's is "
            f"{', '.join(map(str, sorted(known)))}; pass the processor of the same checkpoint."
        )


def _encode(processor: Any, shown: Sequence[Any], questions: Sequence[str]) -> Inputs:
    """A batch of prompts with a picture each."""
    padding = {"padding": True} if len(shown) > 1 else {}  # a tokenizer may have no padding token
    try:
        if getattr(processor, "chat_template", None):
            contents = [
                [{"type": "image", "image": one}, {"type": "text", "text": question}]
                for one, question in zip(shown, questions, strict=True)
            ]
            chats = [[{"role": "user", "content": content}] for content in contents]
            return dict(chat_inputs(processor, chats, **padding, return_tensors="pt"))
        token = getattr(processor, "image_token", None) or "<image>"
        texts = [f"{token}\n{question}" for question in questions]
        return dict(processor(images=[[one] for one in shown], text=texts, return_tensors="pt", **padding))
    except Exception as error:  # processors raise whatever their parts raise
        raise ValueError(
            f"{type(processor).__name__} cannot make a prompt of a picture and a question "
            f"({type(error).__name__}: {' '.join(str(error).split())[:120]}): pass inputs= instead."
        ) from error


def _placed(inputs: Inputs, model: Any) -> Inputs:
    """On the model's device, pixels in its type; without what its forward does not take."""
    weight = weight_of(model)
    signature = inspect.signature(model.forward).parameters
    takes_all = any(one.kind is one.VAR_KEYWORD for one in signature.values())
    out = {}
    for name, value in inputs.items():
        if value is None or not (takes_all or name in signature):
            continue
        if isinstance(value, Tensor):
            value = value.to(weight.device)
            value = value.to(weight.dtype) if value.is_floating_point() else value
        out[name] = value
    return out


# ------------------------------------------------------------------------------------------------------------ together
def join(model: Any, parts: Sequence[Inputs]) -> Inputs:
    """Single prompts as one batch, padded on the left; pictures of unequal shape are padded with zeros."""
    length = max(part["input_ids"].shape[1] for part in parts)
    fill = getattr(model.generation_config, "pad_token_id", None) or 0
    out: Inputs = {}
    for name in {name: None for part in parts for name in part}:
        values = [(part[name], part["input_ids"]) for part in parts if part.get(name) is not None]
        if all(_is_rowwise(name, value, ids) for value, ids in values):
            blank = fill if name == "input_ids" else 0
            rows = [
                pad(value, (0, 0) * (value.dim() - 2) + (length - value.shape[1], 0), value=blank)
                for value, _ in values
            ]
            out[name] = torch.cat(rows)
        elif all(isinstance(value, Tensor) for value, _ in values):
            out[name] = _stacked([value for value, _ in values])
        else:
            out[name] = [entry for value, _ in values for entry in value]
    return out


def twice(inputs: Inputs) -> Inputs:
    """One prompt of twice the text and twice the pictures."""
    ids = inputs["input_ids"]
    return {
        name: torch.cat([value, value], 1) if _is_rowwise(name, value, ids) else _stacked([value, value])
        for name, value in inputs.items()
        if isinstance(value, Tensor)
    }


def _is_rowwise(name: str, value: Any, ids: Tensor) -> bool:
    """Whether an argument has an entry for each token; one of pictures may have the same shape by chance."""
    return isinstance(value, Tensor) and value.shape[:2] == ids.shape and not name.startswith(OF_PICTURES)


def _stacked(values: Sequence[Tensor]) -> Tensor:
    shapes = [value.shape[1:] for value in values]
    widest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    return torch.cat([pad(value, _margins(value.shape[1:], widest)) for value in values])


def _margins(shape: Sequence[int], widest: Sequence[int]) -> list[int]:
    """Arguments of ``pad`` that bring a shape to another one, by zeros behind."""
    return [margin for size, wide in zip(reversed(shape), reversed(widest), strict=True) for margin in (0, wide - size)]


def _tensor_painter(inputs: Inputs) -> tuple[Callable[[Box], Inputs] | None, tuple[int, int] | None]:
    """Paints in the pixels of a prompt with one plain picture (1, 3, H, W); others have crops or patches."""
    pixels = inputs.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.dim() != 4 or len(pixels) != 1 or "image_sizes" in inputs:
        return None, None

    def paint(box: Box) -> Inputs:
        x0, y0, x1, y1 = (round(value) for value in box)
        changed = pixels.clone()
        changed[..., y0:y1, x0:x1] += 3.0
        return {**inputs, "pixel_values": changed}

    return paint, (pixels.shape[2], pixels.shape[3])
