# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL and its mixture of experts: features of several tower layers are added in the first decoder layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtoken.adapters.qwen_vl import QwenVLAdapter
from vtoken.ops.ragged import gather

if TYPE_CHECKING:
    from vtoken.engine.hooks import AdapterHooks


class Qwen3VLAdapter(QwenVLAdapter):
    """`transformers.Qwen3VLForConditionalGeneration` and `Qwen3VLMoeForConditionalGeneration`."""

    model_types = ("qwen3_vl", "qwen3_vl_moe")

    def resampled(self, modality: str, call: dict[str, Any], grids: list[tuple[int, int]]) -> dict[str, Any]:
        raise ValueError(
            f"{type(self.model).__name__} adds features of several tower layers inside of the decoder, which a second "
            "encoding does not replace: lower max_pixels of the processor instead, or use the reducer 'pooled'."
        )

    def cut_extras(self, kwargs: dict[str, Any], index: Tensor, valid: Tensor) -> dict[str, Any]:
        mask, embeds = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
        if mask is None or embeds is None:
            return kwargs
        mask, rows = cut_rows(mask, index, valid)
        embeds = [layer[rows.to(layer.device)] for layer in embeds]
        return {**kwargs, "visual_pos_masks": mask, "deepstack_visual_embeds": embeds}

    def install(self, hooks: AdapterHooks) -> None:
        follow_deepstack(hooks, self.language_model)


def follow_deepstack(hooks: AdapterHooks, language_model: Any) -> None:
    """A cut between two injections: the later ones find the rows of the group at work."""

    def make(original: Callable) -> Callable:
        def process(hidden: Tensor, mask: Tensor, embeds: Tensor) -> Tensor:
            if (left := hooks.rows()) is not None:
                mask, rows = cut_rows(mask, *left)
                embeds = embeds[rows.to(embeds.device)]
            return original(hidden, mask, embeds)

        return process

    hooks.replace(language_model, "_deepstack_process", make)


def cut_rows(mask: Tensor, index: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the visual tokens ``index`` (B, n) of ``mask`` (B, S).

    Returns
    -------
    mask : Tensor
        (B, n) bool.
    rows : Tensor
        (V,) long: which of the visual tokens are left.
    """
    order = torch.full(mask.shape, -1, device=mask.device)
    order[mask] = torch.arange(int(mask.sum()), device=mask.device)
    order = torch.where(valid.to(mask.device), gather(order, index), -1)
    return order >= 0, order[order >= 0]
