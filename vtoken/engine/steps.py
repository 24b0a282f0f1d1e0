# SPDX-License-Identifier: Apache-2.0
"""A step on a pruned cache: a layer that holds other columns than the first one needs a mask of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from vtoken.engine import cache as kv
from vtoken.engine import masks
from vtoken.engine.repair import weighed_step

if TYPE_CHECKING:
    from vtoken.adapters.base import Adapter
    from vtoken.engine.forward import Forward


def step_kwargs(
    adapter: Adapter, kind: str, index: int, args: tuple, kwargs: dict[str, Any], forward: Forward | None
) -> tuple[tuple, dict[str, Any]] | None:
    """Arguments of layer ``index``, of a ``kind`` of attention; None where those that it was given are right.

    Traced by torch.compile where the cache is static: then only tensors of constant shapes are touched.
    """
    cache: Any = kwargs.get("past_key_values")
    source = adapter.kv_source(index)
    pruned = kv.pruned_of(cache, source) if cache is not None else None
    if pruned is None:
        return None
    hidden = args[0] if args[0].dim() == 3 else args[0][0]  # one of several residual streams
    mask = given = kwargs.get("attention_mask")
    if pruned.buffer is not None and isinstance(given, Tensor):
        mask = masks.static_step_mask(cache, source, given, source != index)
    else:
        mask = _own_mask(adapter, kind, source, hidden, kwargs, forward)
    if pruned.worth is not None:
        memo = {} if forward is None else forward.masks
        key = (pruned.group, kind, "weighed")
        if key not in memo:
            memo[key] = weighed_step(adapter, index, mask, cache, hidden)
        mask = memo[key]
    return None if mask is given else (args, {**kwargs, "attention_mask": mask})


def _own_mask(
    adapter: Adapter, kind: str, source: int, hidden: Tensor, kwargs: dict[str, Any], forward: Forward | None
) -> Any:
    """The mask of a layer that attends to the columns of layer ``source``; the given one where that is right."""
    cache: Any = kwargs["past_key_values"]
    pruned, first, given = kv.pruned_of(cache, source), kv.pruned_of(cache), kwargs.get("attention_mask")
    assert pruned is not None
    assert first is not None
    query = hidden.shape[1]
    window = masks.window_of(adapter, kind) if pruned.buffer is None and query == 1 and not adapter.recounts else None
    if pruned.group == first.group and window is None:
        return given  # the model builds the mask of the first layer itself
    memo = {} if forward is None else forward.masks
    key = (pruned.group, kind)
    if key not in memo:
        prepared = isinstance(given, Tensor) or (given is None and pruned.full)
        if query == 1 and kind == masks.FULL and prepared and pruned.buffer is None:
            memo[key] = None if given is None else masks.step_mask(cache, source, given)
        else:
            mask2d = None if forward is None else forward.mask2d
            columns = masks.columns_of(cache, source, query, mask2d, masks.in_window(kind, window, mask2d))
            nothing, told = columns is None and given is None, masks.FULL if kind == masks.CHUNKED else None
            memo[key] = None if nothing else masks.build_mask(adapter, source, hidden, columns, cache, kind=told)
    return memo[key]
