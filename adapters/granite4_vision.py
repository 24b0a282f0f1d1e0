# SPDX-License-Identifier: Apache-2.0
"""Granite 4 Vision: pictures are no embeddings, but features that are added before several decoder layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from vtoken.adapters.base import SHORTENING
from vtoken.adapters.generic import GenericAdapter
from vtoken.adapters.qwen3_vl import cut_rows

if TYPE_CHECKING:
    from vtoken.engine.hooks import AdapterHooks

MASK, FEATURES = "vision_mask", "deepstack_features"
"""Arguments of the language model: (B, S, 1) bool, and (V, D) by number of a layer."""


class Granite4VisionAdapter(GenericAdapter):
    """`transformers.Granite4VisionForConditionalGeneration`.

    The embeddings of visual tokens are zero; reducers are shown the features that come first instead.
    """

    model_types = ("granite4_vision",)
    answers = frozenset({"deepstack"})
    limits: ClassVar[Mapping[str, str]] = {SHORTENING: "adds its visual features between decoder layers"}

    def read_block(self, layer: int | float) -> int:
        raise ValueError(
            f"{type(self.model).__name__} makes its visual tokens of several blocks of the vision tower and adds them "
            "between decoder layers, so that no block's patches become tokens: use a reducer that needs no encoder "
            "attention."
        )

    def shown(self, kwargs: dict[str, Any]) -> Tensor:
        embeds: Tensor = kwargs["inputs_embeds"]
        if not kwargs.get(FEATURES):
            return embeds
        return embeds.masked_scatter(kwargs[MASK], kwargs[FEATURES][min(kwargs[FEATURES])].to(embeds))

    def with_shown(self, kwargs: dict[str, Any], states: Tensor) -> dict[str, Any]:
        if not kwargs.get(FEATURES):
            return super().with_shown(kwargs, states)
        rows = states[kwargs[MASK][..., 0].to(states.device)]
        return {**kwargs, FEATURES: {**kwargs[FEATURES], min(kwargs[FEATURES]): rows}}

    def cut_extras(self, kwargs: dict[str, Any], index: Tensor, valid: Tensor) -> dict[str, Any]:
        if not kwargs.get(FEATURES):
            return super().cut_extras(kwargs, index, valid)
        mask, rows = cut_rows(kwargs[MASK][..., 0], index, valid)
        features = {layer: values[rows.to(values.device)] for layer, values in kwargs[FEATURES].items()}
        return {**super().cut_extras(kwargs, index, valid), MASK: mask[..., None], FEATURES: features}

    def install(self, hooks: AdapterHooks) -> None:
        def make(original: Callable) -> Callable:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if kwargs.get(FEATURES):
                    following = _Following(kwargs[MASK], kwargs[FEATURES], hooks)
                    kwargs = {**kwargs, MASK: following, FEATURES: following}
                return original(*args, **kwargs)

            return forward

        super().install(hooks)
        hooks.replace(self.language_model, "forward", make)


class _Following:
    """The mask and the features, as the layers ask for them, for the sequence that these work on."""

    def __init__(self, mask: Tensor, features: dict[int, Tensor], hooks: AdapterHooks) -> None:
        self.mask, self.features, self.hooks = mask, features, hooks

    def __contains__(self, layer: int) -> bool:
        return layer in self.features

    def __getitem__(self, layer: int) -> Tensor:
        features = self.features[layer]
        if (left := self.hooks.rows()) is None:
            return features
        return features[cut_rows(self.mask[..., 0], *left)[1].to(features.device)]

    def to(self, device: torch.device) -> Tensor:
        """The mask."""
        if (left := self.hooks.rows()) is None:
            return self.mask.to(device)
        return cut_rows(self.mask[..., 0], *left)[0][..., None].to(device)
