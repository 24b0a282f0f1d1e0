# SPDX-License-Identifier: Apache-2.0
"""What is where in a model, as its adapter sees it; models that cannot be examined are refused here, by a sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn

from vtoken.adapters import Adapter, adapter_for
from vtoken.adapters.base import MODALITIES
from vtoken.doctor.report import Found
from vtoken.doctor.runs import weight_of
from vtoken.engine.masks import layer_type
from vtoken.wrapping import inside, session_of

MISSING = (AttributeError, StopIteration, IndexError, KeyError)
"""What an adapter raises where a module that it looks for is not there."""


def adapter_of(model: Any) -> Adapter:
    """The adapter of a model that can be examined.

    Raises
    ------
    TypeError
        If it is no model, none that an adapter knows, or only a part of one.
    ValueError
        If it is wrapped, has no weights, or lacks modules in a way that the adapter does not expect.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{type(model).__name__} is no model: pass what from_pretrained returns.")
    name = type(model).__name__
    if session_of(model) is not None:
        raise ValueError(f"{name} is wrapped, and the doctor wraps it itself: call vtoken.unwrap(model) first.")
    offloaded = any(hasattr(part, "_hf_hook") for part in model.modules())  # accelerate fetches weights when called
    if not offloaded and any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"{name} is on the meta device, where there are no weights: load it with from_pretrained, or run its shape "
            "with vtoken doctor --random-weights."
        )
    try:
        adapter = adapter_for(inside(model))
        adapter.check_parts()
    except MISSING as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} lacks modules ({why}): load the whole model, not parts of it.") from None
    return adapter


def found_in(model: Any, adapter: Adapter) -> Found:
    """Names and numbers for the report."""
    weight = weight_of(model)
    kinds = Counter(layer_type(adapter, layer) for layer in range(len(adapter.layers)))
    tower = None if adapter.outer is None else adapter.tower
    return Found(
        model_class=type(model).__name__,
        model_type=str(getattr(model.config, "model_type", "")),
        adapter=type(adapter).__name__,
        outer=None if adapter.outer is None else _place(model, adapter.outer),
        language_model=_place(model, adapter.language_model),
        layers=len(adapter.layers),
        layer_kinds=dict(kinds),
        tower=None if tower is None else _place(model, tower),
        tower_blocks=_asked(lambda: len(adapter.tower_blocks)),
        global_blocks=_asked(lambda: list(adapter.global_blocks)),
        projector=_asked(lambda: _place(model, adapter.projector)),
        placeholders={name: adapter.placeholders[code] for name, code in MODALITIES.items()},
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(weight.dtype).removeprefix("torch."),
        device=str(weight.device),
        attention=getattr(model.config, "_attn_implementation", None),
    )


def _place(model: nn.Module, part: nn.Module) -> str:
    """Name and class of a module, from the model down."""
    name = next((name for name, module in model.named_modules() if module is part), "")
    return f"{name or 'the model'} ({type(part).__name__})"


def _asked(question: Callable[[], Any]) -> Any:
    """What the adapter answers; None if the model has no such thing."""
    try:
        return question()
    except (*MISSING, ValueError, TypeError, NotImplementedError):
        return None
