# SPDX-License-Identifier: Apache-2.0
"""All that vtoken knows of transformers versions: which are tested, and what differs between them.

The rest of vtoken speaks the words of one version. The argument that holds the KV cache is `CACHE` to it, which
transformers 5.24 calls `NEW_CACHE`: hooks are called in vtoken's words (`hook`), and what is handed on to transformers
is put in the caller's (`worded`, `in_words_of`). Where something can be asked of the installed code, it is asked and no
version number compared. This file must not know models, reducers or the engine.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from packaging.specifiers import SpecifierSet
from torch import Tensor, nn
from transformers import masking_utils
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

try:
    from transformers.vision_utils import get_vision_window_index
except ImportError:  # transformers < 5.10: a method of the tower
    get_vision_window_index = None  # type: ignore[assignment]

TESTED = ">=5.5,<5.25"
"""The versions that every test, or the smaller matrix of `.ci/run`, was run with."""

CACHE, NEW_CACHE = "past_key_values", "cache"
"""The name of the argument that holds the KV cache, before transformers 5.24 (and here) and since."""


def warn_if_untested(level: int) -> None:
    """Warn, in one sentence, of a transformers that nobody has tried; ``level`` as in ``warnings.warn``."""
    found = transformers.__version__
    if not SpecifierSet(TESTED).contains(found, prereleases=True):
        warnings.warn(
            f"transformers {found} is outside of {TESTED}, the versions that vtoken is tested with: if a result looks "
            f'odd, pip install "transformers{TESTED}".',
            stacklevel=level + 1,
        )


def way_out() -> str:
    """What to do about a model whose calls vtoken does not understand."""
    return f'pip install "transformers{TESTED}", and use the model\'s stock class'


# ------------------------------------------------------------------------------------------------- names of arguments
def ours(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call, with the cache named `CACHE`; given under both names, the new one counts."""
    return _renamed(kwargs, NEW_CACHE, CACHE) if NEW_CACHE in kwargs else kwargs


def worded(kwargs: dict[str, Any], example: dict[str, Any]) -> dict[str, Any]:
    """Arguments in our words, put in those of ``example``, the call that they came from."""
    return _renamed(kwargs, CACHE, NEW_CACHE) if NEW_CACHE in example else kwargs


def in_words_of(function: Callable, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments in our words, put in those of a function."""
    return _renamed(kwargs, CACHE, NEW_CACHE) if NEW_CACHE in inspect.signature(function).parameters else kwargs


def _renamed(kwargs: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    if old not in kwargs:
        return kwargs
    return {**{name: value for name, value in kwargs.items() if name not in (old, new)}, new: kwargs[old]}


def hook(act: Callable[[Any, tuple, dict[str, Any]], Any]) -> Callable[[Any, tuple, dict[str, Any]], Any]:
    """A forward pre-hook that calls ``act`` in our words and hands its answer on in those of the call."""
    return functools.partial(_translated, act)


def _translated(act: Callable, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    if NEW_CACHE not in kwargs:
        return act(module, args, kwargs)
    answer = act(module, args, ours(kwargs))
    return answer if answer is None else (answer[0], worded(answer[1], kwargs))


def call_of(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a module's call by name, in our words; ``kwargs`` are so already."""
    forward = type(module).forward
    bound = inspect.signature(forward).bind_partial(module, *args, **in_words_of(forward, kwargs)).arguments
    return ours({**bound, **bound.get("kwargs", {})})


def given_cache(kwargs: dict[str, Any]) -> Any:
    """The cache among arguments of a call, under either name; None if there is none."""
    return kwargs.get(NEW_CACHE, kwargs.get(CACHE))


def cache_of(output: Any) -> Any:
    """The cache in the output of a model or of ``generate``."""
    return getattr(output, NEW_CACHE if hasattr(output, NEW_CACHE) else CACHE)


def check_takes(module: nn.Module, names: Iterable[str]) -> None:
    """Make sure that a module's ``forward`` takes the arguments which the engine reads and replaces.

    One that names no argument at all, only ``*args, **kwargs``, hands them on to whom nobody knows, and passes.

    Raises
    ------
    NotImplementedError
        If one is missing.
    """
    parameters = inspect.signature(type(module).forward).parameters
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {name for name, parameter in parameters.items() if parameter.kind not in variadic} - {"self"}
    for name in names if named else ():
        if name not in named and not (name == CACHE and NEW_CACHE in named):
            raise NotImplementedError(
                f"{type(module).__name__}.forward takes no argument {name!r}, which vtoken has to replace, in "
                f"transformers {transformers.__version__}: {way_out()}."
            )


# ------------------------------------------------------------------------------------------------------------- masks
def causal_mask(kind: str, config: Any, mask: Tensor | None, cache: Any, hidden: Tensor, **more: Any) -> Any:
    """The mask of a decoder layer from the 2-D validity of its columns, by transformers' own functions.

    Parameters
    ----------
    kind : str
        ``"sliding_attention"``, ``"chunked_attention"``, or any other for a layer that sees all.
    hidden : Tensor
        (B, n, D): tells rows, new tokens, type and device.
    """
    makers: dict[str, Any] = {
        "sliding_attention": masking_utils.create_sliding_window_causal_mask,
        "chunked_attention": masking_utils.create_chunked_causal_mask,
    }
    make = makers.get(kind, masking_utils.create_causal_mask)
    if "cache_position" in inspect.signature(make).parameters:  # an argument before transformers 5.10
        past = cache.get_seq_length() if cache is not None else 0
        more["cache_position"] = torch.arange(hidden.shape[1], device=hidden.device) + past
    given = {"config": config, "inputs_embeds": hidden, "attention_mask": mask, CACHE: cache, **more}
    return make(**in_words_of(make, given))


# ------------------------------------------------------------------------------------------- caches and checkpointing
CROPS_TO_A_LENGTH = "tokens_to_remove" not in inspect.signature(DynamicLayer.crop).parameters
"""Whether a positive argument of a cache's ``crop`` is a length to crop to (transformers < 5.14); refused since."""

_CHECKPOINTS_HOOKS = "__call__" in vars(GradientCheckpointingLayer)


def check_checkpointing(module: nn.Module, where: str) -> None:
    """Make sure that a layer which is cut runs its hooks once under gradient checkpointing.

    Raises
    ------
    NotImplementedError
        Before transformers 5.23, where hooks are computed a second time with the layer.
    """
    if _CHECKPOINTS_HOOKS and module.training and getattr(module, "gradient_checkpointing", False):
        raise NotImplementedError(
            f"Cutting inside the {where} under gradient checkpointing needs transformers >= 5.23: "
            "upgrade, or use a reducer that acts before the language model."
        )


# ------------------------------------------------------------------------------------------------------------- vision
def vision_window_index(tower: Any, grids: Tensor) -> Tensor:
    """(T,) long: for each merged patch in the order of Qwen2.5-VL's windowed tower, its place in raster order."""
    if get_vision_window_index is None:
        return tower.get_window_index(grids)[0]
    return get_vision_window_index(grids, tower.spatial_merge_size, tower.window_size, tower.patch_size)[0]


def clip_pixels(call: dict[str, Any]) -> Tensor:
    """Pixels (clips, frames, ...) among the arguments of ``get_video_features``, whose name differs in old versions."""
    return call["pixel_values_videos"] if "pixel_values_videos" in call else call["pixel_values"]


def chat_inputs(processor: Any, conversations: Iterable[Any], **packing: Any) -> Any:
    """What a processor makes of conversations that an answer is to follow; ``packing`` are arguments of its call."""
    # they were plain ones in earlier versions
    named = "processor_kwargs" in inspect.signature(processor.apply_chat_template).parameters
    return processor.apply_chat_template(
        list(conversations),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **({"processor_kwargs": packing} if named else packing),
    )


def takes_encoded(outer: nn.Module) -> bool:
    """Whether a model accepts encoded pictures (``mm_encoder_outputs``), as all do since transformers 5.18."""
    return "mm_encoder_outputs" in inspect.signature(outer.forward).parameters
