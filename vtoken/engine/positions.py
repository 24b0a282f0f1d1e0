# SPDX-License-Identifier: Apache-2.0
"""Position ids of kept tokens: the original ones, or consecutive ones (``positions="compact"``).

With the original ids decoding goes on from the original place by itself, since ``generate`` counts them up. Compact ids
are lower than ``generate`` believes: by how much is remembered on the cache, and taken off in every later pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtoken.engine import cache as kv
from vtoken.engine.prompt import Prompt
from vtoken.ops.ragged import gather


def shift_of(cache: Any) -> Tensor | None:
    """(B,) how much the ids of a cache were lowered; None where they are the original ones."""
    pruned = kv.pruned_of(cache)
    return None if pruned is None else pruned.shift


def given_or_counted(position_ids: Tensor | None, past: int, length: int, device: torch.device) -> Tensor:
    """The ids that the language model was given, or those that it counts itself for ``length`` new tokens."""
    return torch.arange(past, past + length, device=device)[None] if position_ids is None else position_ids


def renumbered(prompt: Prompt, kept: Tensor, position_ids: Tensor | None, past: int, shift: Tensor | None) -> Tensor:
    """(B, n) consecutive ids of the tokens ``kept`` (B, n), from the id that the first token of the call had.

    Raises
    ------
    NotImplementedError
        If ids are not one number a token (M-RoPE), or tell the documents of a packed row.
    """
    if prompt.document is not None:
        raise NotImplementedError(
            "positions='compact' is not defined for packed rows, whose documents are told by their position ids: "
            "pass positions='keep'."
        )
    position_ids = given_or_counted(position_ids, past, prompt.real.shape[1], kept.device)
    if position_ids.dim() != 2:
        raise NotImplementedError(
            "positions='compact' is defined for 1-D position ids only, this model uses M-RoPE: pass positions='keep'."
        )
    first = gather(position_ids, prompt.real.to(torch.int8).argmax(1, keepdim=True))
    if shift is not None:
        first = first - shift[:, None].to(first.device)
    return (kept.cumsum(1) - 1).clamp(min=0) + first


def gone_on(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the language model in a step: its position ids go on where compact ones ended.

    Raises
    ------
    NotImplementedError
        If the language model would count positions by a static cache.
    """
    cache: Any = kwargs.get("past_key_values")
    if kv.is_static(cache) and kwargs.get("position_ids") is None and kv.pruned_of(cache) is not None:
        raise NotImplementedError(
            "This model counts positions by the cache, and a pruned StaticCache does not know its logical length: "
            "pass position_ids to forward, or use a dynamic cache."
        )
    if (shift := shift_of(cache)) is None:
        return kwargs
    embeds = kwargs.get("inputs_embeds")
    given = kwargs["input_ids"] if embeds is None else embeds
    position_ids = kwargs.get("position_ids")
    position_ids = given_or_counted(position_ids, kv.logical_length(cache), given.shape[1], given.device)
    return {**kwargs, "position_ids": position_ids - shift[:, None].to(position_ids.device)}
