# SPDX-License-Identifier: Apache-2.0
"""Encodes the pictures of a prompt outside of a forward pass, for functions that need no hooks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtoken.adapters.base import MODALITIES, Adapter
from vtoken.engine.tower import VisionReader, VisionRecord

PIXELS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}


def encode(
    adapter: Adapter, reader: VisionReader, inputs: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, VisionRecord]]:
    """Run the vision tower on the pixels of processor output ``inputs``.

    Returns
    -------
    outputs : dict
        What ``get_image_features`` and ``get_video_features`` of the model returned, by modality.
    records : dict
        The items of each modality.

    Raises
    ------
    NotImplementedError
        If the model encodes inside of a method that does more than that.
    ValueError
        If there are no pixels.
    """
    if adapter.outer is None:
        raise NotImplementedError(
            f"{type(adapter.model).__name__} encodes and scatters pictures in one call, which this function cannot "
            "take apart: wrap the model instead, or use the checkpoint converted to transformers' own classes."
        )
    outputs, records = {}, {}
    for modality in MODALITIES:
        if not any(inputs.get(name) is not None for name in PIXELS[modality]):
            continue
        method = getattr(adapter.outer, f"get_{modality}_features")
        names = {*inspect.signature(method).parameters, *_tower_arguments(adapter)}
        given = {name: value for name, value in inputs.items() if name in names}
        if modality == "video" and "pixel_values_videos" not in names:  # an older transformers
            given["pixel_values"] = inputs["pixel_values_videos"]
        outputs[modality], records[modality] = reader(method, modality, **given, return_dict=True)
    if not records:
        raise ValueError(f"The inputs hold no pixels ({', '.join(inputs)}): pass what the model's processor returns.")
    return outputs, records


def _tower_arguments(adapter: Adapter) -> set[str]:
    """What the tower alone is told about the pixels (SigLIP 2's masks and shapes), passed on by name."""
    tower, model = (inspect.signature(module.forward).parameters for module in (adapter.tower, adapter.model))
    return set(tower) - set(model)


def real_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """(B, S) bool: tokens that are not padding."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
