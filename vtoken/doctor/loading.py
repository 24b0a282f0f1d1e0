# SPDX-License-Identifier: Apache-2.0
"""The model that ``vtoken doctor NAME`` names: embedded, a folder, a hub id, or a shape with random weights.

Unlike an evaluation, the doctor also takes types that no adapter names: finding out is what it is for.
"""

from __future__ import annotations

import gc
from typing import Any, NamedTuple

import torch

from vtoken import mini
from vtoken.eval.model.loading import ModelSpec, first_sentence

DTYPES = ("float32", "bfloat16", "float16")


class Loaded(NamedTuple):
    """A model, its processor if it has one, and what was changed to make it fit."""

    model: Any
    processor: Any
    note: str


def target_of(device: str | None) -> str:
    """The device named, else the accelerator, else the CPU."""
    if device is not None:
        return device
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator is not None else "cpu"


def load(name: str, *, random_weights: bool, device: str | None, dtype: str, attn: str | None) -> Loaded:
    """Load what the command line names.

    Raises
    ------
    ValueError
        If there is no such model, type, device or dtype, or it cannot be loaded; one sentence.
    """
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"Unknown dtype {dtype!r}: choose one of auto, {', '.join(DTYPES)}.")
    target = target_of(device)
    try:
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"The device {target!r} cannot be used: {first_sentence(error)}") from None
    loaded = _random(name, target, dtype) if random_weights else _checkpoint(name, target, dtype)
    if attn is not None:
        try:
            loaded.model.set_attn_implementation(attn)
        except (ValueError, ImportError) as error:
            raise ValueError(f"The attention backend {attn!r} cannot be used: {first_sentence(error)}") from None
    return loaded


def _random(name: str, device: str, dtype: str) -> Loaded:
    from vtoken.profile.shapes import fitting_model, shape_config

    chosen = ("float32" if device == "cpu" else "bfloat16") if dtype == "auto" else dtype
    model, note = fitting_model(shape_config(name), device=device, dtype=getattr(torch, chosen))
    return Loaded(model, None, note)


def _checkpoint(name: str, device: str, dtype: str) -> Loaded:
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    embedded = ModelSpec(name).kind == "embedded"  # says which names there are
    where = mini.folder(name) if embedded else name
    if embedded and dtype == "auto":
        dtype = "float32"  # stored in float16 to be small
    try:
        kind = AutoConfig.from_pretrained(where).model_type
        if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            raise _NoPicturesError(
                f"{name!r} is of the type {kind!r}, which is no image-text-to-text model of this transformers: take a "
                "vision-language model, or pass a model of your own code to vtoken.check."
            )
        found: Any = AutoModelForImageTextToText.from_pretrained(where, dtype=dtype, output_loading_info=True)
        model, info = found
        processor = AutoProcessor.from_pretrained(where)
    except _NoPicturesError:
        raise
    except Exception as error:  # safetensors, tokenizers and torch raise types of their own
        raise ValueError(f"The model {name!r} cannot be loaded: {first_sentence(error)}") from error
    if missing := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        what = f"{len(missing)} tensors, such as {missing[0]!r}, are missing"
        raise ValueError(f"The weights of {name!r} are incomplete, {what}: load a complete checkpoint.")
    try:
        return Loaded(model.to(device).eval(), processor, "")
    except torch.OutOfMemoryError:
        del model, found
        gc.collect()
        raise ValueError(f"The weights of {name!r} have no room on {device}: take a smaller dtype or device.") from None


class _NoPicturesError(ValueError):
    """A model of another kind."""
