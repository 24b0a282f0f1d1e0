# SPDX-License-Identifier: Apache-2.0
"""What reducers read of the decoder: attention rows of a layer that ran or comes next, and a layer run on the side.

Rows are named as in `vtoken.Reducer.taps` and are those of the prompts that a reducer sees (`View`), not of the batch
rows that the layer works on. Choosing is not differentiated: nothing here keeps gradients, so that a layer which is
computed a second time (gradient checkpointing) saves the same tensors without its reader. This file must not know
caches, and knows masks only through `vtoken.engine.masks`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtoken import compat
from vtoken.context import Attention, VisualContext
from vtoken.engine import masks
from vtoken.engine.taps import Reader, SeenEnoughError, tap, untapped
from vtoken.ops.ragged import compact, gather, restore
from vtoken.precision import without_autocast

if TYPE_CHECKING:
    from vtoken.adapters.base import Adapter
    from vtoken.engine.prompt import View

BESIDE = ("position_bias", "sinks", "s_aux")
"""Arguments of attention that change its rows beside queries, keys and masks."""


def attention_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
    rows: Tensor | None = None,
    softmax: bool = True,
    documents: Tensor | None = None,
) -> Tensor:
    """``softmax(query[rows] keyᵀ)`` in float32, as the module itself would compute it.

    Parameters
    ----------
    query, key : Tensor
        (B, H, Q, d) and (B, G, K, d), G dividing H.
    mask : Tensor, BlockMask or None
        A prepared 4-D mask, a 2-D padding mask (flash attention), a block mask, or None: causal if the module is.
    rows : Tensor, optional
        (B, R) query indices; all rows if omitted.
    softmax : bool
        False returns the masked logits.
    documents : Tensor, optional
        (B, Q) long: documents that attend to themselves only, where the mask does not tell.

    Returns
    -------
    Tensor
        (B, H, R, K).
    """
    if beside := [name for name in BESIDE if kwargs.get(name) is not None]:
        raise NotImplementedError(
            f"{type(module).__name__} adds to its logits what only its backend knows ({beside[0]}), so that its "
            "attention cannot be read: use a reducer that reads no decoder attention."
        )
    size, heads, queries, width = query.shape
    keys = key.shape[2]
    scale = kwargs.get("scaling") or width**-0.5
    rows = torch.arange(queries, device=query.device).expand(size, queries) if rows is None else rows.to(query.device)
    picked = query.gather(2, rows[:, None, :, None].expand(-1, heads, -1, width))
    grouped = picked.view(size, key.shape[1], -1, rows.shape[1], width)
    with without_autocast(query.device):
        logits = torch.einsum("bghrd,bgkd->bghrk", grouped.float(), key.float()).reshape(size, heads, -1, keys) * scale
    if cap := kwargs.get("softcap"):
        logits = torch.tanh(logits / cap) * cap
    causal, window = masks.is_causal(module, kwargs), kwargs.get("sliding_window")
    seen = masks.rows_seen(mask, rows, (queries, keys), causal, window, documents)
    logits = logits.masked_fill(~seen, float("-inf")) if seen.dtype == torch.bool else logits + seen.float()
    return logits.softmax(-1) if softmax else logits


def read_rows(
    ctx: VisualContext,
    view: View,
    what: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
    documents: Tensor | None,
) -> Attention:
    """The rows ``what`` of a layer's attention, over the tokens of the prompts.

    Parameters
    ----------
    view : View
        Of the sequence that the layer works on, (B, n).
    query, key : Tensor
        (B, H, n, d) and (B, G, K, d); the last n keys are those of the sequence. ``kwargs["value"]`` as ``key``.
    documents : Tensor or None
        (B, n): see `vtoken.engine.masks.documents_of`.
    """
    rows, valid = ctx.rows(what)
    new = key.shape[2] - query.shape[2]
    query, key = view.rows(query), view.rows(key)
    if isinstance(mask, Tensor):
        mask = view.rows(mask)
    elif mask is not None and view.row is not None:
        mask = masks.of_rows(mask, view.row)
    documents = None if documents is None else view.rows(documents)
    found = attention_rows(module, query, key, mask, kwargs, view.places(rows), documents=documents)[..., new:]
    values = kwargs.get("value")
    if view.index is not None:
        there = view.valid[:, None, None, :].to(found.device)
        found = torch.where(there, gather(found, view.index, dim=3), 0.0)
    if values is None:
        return Attention(found, valid)
    parts: tuple[Tensor, ...] = (view.rows(values)[:, :, new:], key[:, :, new:])
    if view.index is not None:
        parts = tuple(gather(part, view.index, dim=2) for part in parts)
    return Attention(found, valid, *(part.detach() for part in parts))


def reader(
    look: Callable[[int], tuple[VisualContext, View, Tensor | None, int]],
    what: str,
    store: Callable[[Attention], None],
) -> Reader:
    """A reader for `vtoken.engine.taps.tap` that stores the rows ``what``.

    Parameters
    ----------
    look : callable
        For the number of its new tokens gives the context, the view and the documents of the sequence that the layer
        works on when it runs, and how many of its keys count (a static cache hands out more).
    """

    @torch.no_grad()
    def read(module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> None:
        ctx, view, documents, columns = look(query.shape[2])
        if isinstance(mask, Tensor) and mask.dim() == 4:
            mask = mask[..., :columns]
        kwargs = {**kwargs, "value": kwargs["value"][:, :, :columns]}
        store(read_rows(ctx, view, what, module, query, key[:, :, :columns], mask, kwargs, documents))

    return read


class Coming:
    """The decoder layer that comes next, as `VisualContext.peek` and `VisualContext.rerun` ask it.

    Parameters
    ----------
    adapter : Adapter
        Where things are in the model.
    layer : int
        Its number.
    module : nn.Module
        The layer.
    kwargs : dict
        What it will be called with, for the sequence that it will work on.
    hidden : Tensor
        (B, n, D): the states of that sequence.
    view : View
        The prompts in it.
    documents : Tensor or None
        (B, n).
    aside : callable
        A context manager inside of which the layer runs beside the pass.
    """

    def __init__(
        self,
        adapter: Adapter,
        layer: int,
        module: nn.Module,
        kwargs: dict[str, Any],
        hidden: Tensor,
        view: View,
        documents: Tensor | None,
        aside: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self.adapter, self.layer, self.module, self.kwargs = adapter, layer, module, kwargs
        self.hidden, self.view, self.documents, self.aside = hidden, view, documents, aside

    @torch.no_grad()
    def peek(self, ctx: VisualContext, what: str) -> Attention:
        """Attention rows on the present states: projections and rope run, the attention does not."""
        box: list[Attention] = []
        mask, length = self.kwargs.get("attention_mask"), self.hidden.shape[1]
        if masks.is_prepared(mask):
            mask = masks.new_columns(mask, length, self.kwargs.get("past_key_values"), self.layer)
        elif isinstance(mask, Tensor):
            mask = mask[:, -length:]

        def read(module: nn.Module, query: Tensor, key: Tensor, _: Any, kwargs: dict[str, Any]) -> None:
            box.append(read_rows(ctx, self.view, what, module, query, key, mask, kwargs, self.documents))
            raise SeenEnoughError

        block = self.adapter.attention(self.module)
        normed = getattr(self.module, self.adapter.attention_norm)(self.hidden)
        tables = {name: value for name, value in self.kwargs.items() if name == "position_embeddings"}
        with tap(block, read), contextlib.suppress(SeenEnoughError):
            given = {"hidden_states": normed, "attention_mask": None, compat.CACHE: None, **tables}
            block(**compat.in_words_of(type(block).forward, given))
        return Attention(box[0].probabilities, box[0].valid)

    @torch.no_grad()
    def rerun(self, keep: Tensor) -> Tensor:
        """States (P, m, D) that the layer makes of the tokens ``keep`` (P, m) alone, earlier turns left out."""
        index, valid = compact(keep)
        hidden = gather(self.view.take(self.hidden), index)
        mask = masks.build_mask(self.adapter, self.layer, hidden, valid, None)
        kwargs = {**self.kwargs, "position_ids": None, "attention_mask": mask, compat.CACHE: None}
        if (tables := self.kwargs.get("position_embeddings")) is not None:
            kwargs["position_embeddings"] = table_rows(tables, self.view, index)
        kwargs = compat.in_words_of(type(self.module).forward, kwargs)
        linear = "linear" in masks.layer_type(self.adapter, self.layer)
        with self.aside(), contextlib.nullcontext() if linear else untapped(self.adapter.attention(self.module)):
            output = self.module.forward(hidden, **kwargs)  # not called: hooks and checkpointing are the real run's
        return restore(output[0] if isinstance(output, tuple) else output, keep)


def table_rows(tables: Any, view: View | None, index: Tensor) -> Any:
    """Rows of rotary tables (..., S, d), of which a layer gets one or several.

    Parameters
    ----------
    view : View or None
        Prompts whose rows are wanted; None for the batch rows.
    index : Tensor
        (P, m) or (B, n): places in them.
    """
    if tables is None:  # a layer without positions
        return None
    if not isinstance(tables, Tensor):
        return tuple(table_rows(table, view, index) for table in tables)
    batch = tables.dim() - 3
    if view is not None and view.index is not None:
        index = view.places(index)
        if view.row is not None and tables.shape[batch] > 1:
            tables = tables.index_select(batch, view.row.to(tables.device))
    return gather(tables, index, dim=tables.dim() - 2, batch=batch)
