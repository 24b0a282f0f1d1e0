# SPDX-License-Identifier: Apache-2.0
"""Decoder attention as reducers read it."""

from __future__ import annotations

import torch
from torch import Tensor

from vtoken.context import Attention, Cut, VisualContext


def rows_at(ctx: VisualContext, layer: int) -> Attention:
    """The recorded attention rows of ``layer``, on the device of the context."""
    found = ctx.attention[layer]
    device = ctx.hidden.device
    values, keys = (None if part is None else part.to(device) for part in (found.values, found.keys))
    return Attention(found.probabilities.to(device), found.valid.to(device), values, keys)


def mean_over_rows(attention: Attention, rows: Tensor | None = None) -> Tensor:
    """Mean over heads and valid rows: (B, S).

    Parameters
    ----------
    attention : Attention
        (B, H, R, S).
    rows : Tensor, optional
        (B, R) bool: rows to average; all valid ones if omitted.
    """
    rows = attention.valid if rows is None else rows & attention.valid
    total = (attention.probabilities.float().mean(1) * rows[..., None]).sum(1)
    return total / rows.sum(1, keepdim=True).clamp(min=1)


def text_to_visual(attention: Attention, visual: Tensor) -> Tensor:
    """Share (B,) of the attention of text rows that goes to visual tokens (ToDRE, arXiv 2505.18757, Eq. 8).

    A row of the batch without any text row gets 1: nothing says that its visual tokens are not needed.
    """
    share = (mean_over_rows(attention) * visual).sum(1)
    return torch.where(attention.valid.any(1), share, 1.0)


def question_rows(ctx: VisualContext) -> tuple[Tensor, Tensor]:
    """Places (B, R) of the rows that a ``"question"`` tap records, right aligned, and which are real."""
    return ctx.rows("question")


def leave(ctx: VisualContext, rows: Tensor) -> Cut:
    """Drop all visual tokens, newlines included, of the batch rows named by ``rows`` (B,) bool."""
    return Cut(ctx.valid & ~rows[ctx.row.clamp(min=0)][:, None])
