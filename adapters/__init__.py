# SPDX-License-Identifier: Apache-2.0
"""Model families: where things are in each of them.

A family is one file with one `Adapter`; what follows transformers' conventions needs none (`GenericAdapter`).
"""

from __future__ import annotations

from typing import Any

from vtoken.adapters.base import Adapter
from vtoken.adapters.generic import GenericAdapter
from vtoken.adapters.granite4_vision import Granite4VisionAdapter
from vtoken.adapters.internvl import InternVLAdapter
from vtoken.adapters.internvl_chat import InternVLChatAdapter
from vtoken.adapters.llama4 import Llama4Adapter
from vtoken.adapters.llava import LlavaAdapter
from vtoken.adapters.llava_next import LlavaNextAdapter
from vtoken.adapters.llava_next_video import LlavaNextVideoAdapter
from vtoken.adapters.llava_onevision import LlavaOnevisionAdapter
from vtoken.adapters.original_llava import OriginalLlavaAdapter
from vtoken.adapters.qformer import QFormerAdapter
from vtoken.adapters.qwen3_vl import Qwen3VLAdapter
from vtoken.adapters.qwen4 import Qwen4Adapter
from vtoken.adapters.qwen_vl import QwenVLAdapter
from vtoken.adapters.recounting import Glm5NextAdapter, InklingAdapter, MiniMaxM3Adapter
from vtoken.adapters.tiles import TilesAdapter

ADAPTERS: tuple[type[Adapter], ...] = (
    LlavaAdapter,
    LlavaNextAdapter,
    LlavaNextVideoAdapter,
    LlavaOnevisionAdapter,
    QwenVLAdapter,
    Qwen3VLAdapter,
    InternVLAdapter,
    TilesAdapter,
    Llama4Adapter,
    Granite4VisionAdapter,
    Qwen4Adapter,
    QFormerAdapter,
    InklingAdapter,
    MiniMaxM3Adapter,
    Glm5NextAdapter,
    GenericAdapter,
)

FOREIGN = (OriginalLlavaAdapter, InternVLChatAdapter)
"""Code outside of transformers, recognised by its methods."""

__all__ = ["ADAPTERS", "FOREIGN", "Adapter", "adapter_for", "families", "untested"]


def families() -> dict[str, type[Adapter]]:
    """``config.model_type`` -> adapter, of the types that are tested; any other is tried with `GenericAdapter`."""
    return {model_type: adapter for adapter in ADAPTERS for model_type in adapter.model_types}


def untested(adapter: Adapter) -> str | None:
    """What to tell a user whose type of model no test runs, in a sentence; None for the others."""
    model_type = getattr(adapter.model.config, "model_type", None)
    if not isinstance(adapter, GenericAdapter) or model_type in families():
        return None
    return (
        f"{type(adapter.model).__name__} (type {model_type!r}) is served by convention, and no test runs this type: "
        "vtoken doctor, or vtoken.check(model, inputs), finds out what works on it."
    )


def adapter_for(model: Any) -> Adapter:
    """The adapter of a model, also inside a PEFT wrapper.

    Raises
    ------
    TypeError
        If no adapter knows it.
    """
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    for adapter in FOREIGN:
        if adapter.serves(model):
            return adapter(model)
    model_type: Any = getattr(getattr(model, "config", None), "model_type", None)
    return families().get(model_type, GenericAdapter)(model)
