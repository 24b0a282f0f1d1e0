# SPDX-License-Identifier: Apache-2.0
"""What an exit of all visual tokens can be decided by: the question's states, and what pictures contribute to them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vtoken.context import Attention, VisualContext
from vtoken.ops.ragged import gather
from vtoken.reducers.rows import question_rows


def question_summary(ctx: VisualContext, states: Tensor | None = None) -> Tensor:
    """(B, 2 D) float32: mean of the text states behind the image without the last one, and the last one.

    These are the features of DyVTE's gate (arXiv 2411.19628).

    Parameters
    ----------
    ctx : VisualContext
        At a layer.
    states : Tensor, optional
        (B, S, D): other states of the same tokens than ``ctx.hidden``.
    """
    index, valid = question_rows(ctx)
    rows = gather((ctx.hidden if states is None else states).float(), index)  # right aligned: the last text is last
    rest = rows[:, :-1] * valid[:, :-1, None]
    mean = rest.sum(1) / valid[:, :-1].sum(1, keepdim=True).clamp(min=1)
    return torch.cat([mean, rows[:, -1]], 1)


def contribution(attention: Attention, visual: Tensor) -> Tensor:
    """(B,): length of what visual tokens add to the last row's attention output, relative to all of it.

    ``|sum_{j in V} A_tj v_j| / |sum_j A_tj v_j|`` over the tokens of this prompt, all heads side by side. Unlike the
    attention alone it is not fooled by tokens that gather attention and have small values (sinks).

    Parameters
    ----------
    attention : Attention
        With values.
    visual : Tensor
        (B, S) bool.
    """
    assert attention.values is not None
    rows = attention.probabilities[:, :, -1].float()
    values = attention.values.to(rows)
    values = values.repeat_interleave(rows.shape[1] // values.shape[1], 1)
    seen, everything = (
        torch.einsum("bhs,bhsd->bhd", part, values).flatten(1).norm(dim=1) for part in (rows * visual[:, None], rows)
    )
    return seen / everything.clamp(min=torch.finfo(everything.dtype).tiny)


def divergence(ctx: VisualContext, without: Tensor) -> Tensor:
    """(B,): ``1 - cos`` of the question's summary and of the one (B, 2 D) it has ``without`` the visual tokens."""
    return 1 - functional.cosine_similarity(question_summary(ctx), without.to(ctx.hidden.device), dim=1)
