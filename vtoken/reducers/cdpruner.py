# SPDX-License-Identifier: Apache-2.0
"""CDPruner: a determinantal point process, conditioned on the question."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vtoken.context import VisualContext
from vtoken.ops import dpp
from vtoken.reducers.base import SelectReducer, check_features
from vtoken.reducers.checks import check_choice
from vtoken.reducers.views import Views
from vtoken.registry import register

RELEVANCE = ("text", "none")


@register("cdpruner")
@dataclass(frozen=True)
class CDPruner(SelectReducer):
    """CDPruner (arXiv 2506.10967): the most diverse set of tokens, weighted by relevance to the text.

    The authors measure relevance with CLIP's text tower, which a vision-language model does not carry. Here it is the
    mean cosine of a projected token and the prompt's token embeddings, both of which live in the language model's input
    space: another signal, to which the published numbers do not apply. It is scaled to [0, 1] over an image, where the
    authors scale over the batch. ``relevance="none"`` is the unconditioned process.

    Parameters
    ----------
    relevance : str
        ``"text"`` or ``"none"``.

    Raises
    ------
    ValueError
        If a parameter is out of range or unknown.
    """

    summary = "Determinantal point process, conditioned on the prompt's embeddings."
    paper = "2506.10967"
    uses_text = True
    positions = "compact"

    relevance: str = "text"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("relevance", self.relevance, RELEVANCE)

    def select(self, ctx: VisualContext, budget: Tensor) -> Tensor:
        """Slots (I, K) of each view's process."""
        views = Views.of(ctx)
        x = check_features(ctx.features, ctx.candidates, self.name).float()
        weight = torch.ones_like(ctx.candidates, dtype=x.dtype)
        if self.relevance == "text":
            text, valid = ctx.text_embeddings()
            owner = ctx.row.clamp(min=0)
            weight = rescaled(mean_cosine(x, text[owner], valid[owner]), ctx.candidates)
        return views.pick(dpp(views.take(x), views.take(weight), views.share(budget, equal=True), views.valid))


def mean_cosine(x: Tensor, text: Tensor, valid: Tensor) -> Tensor:
    """(B, N): mean over the valid rows of ``text`` (B, M, D) of their cosine with ``x`` (B, N, D)."""
    unit = functional.normalize(text.float(), dim=2).masked_fill(~valid[..., None], 0.0)
    mean = unit.sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
    return (functional.normalize(x.float(), dim=2) @ mean[..., None])[..., 0]


def rescaled(relevance: Tensor, valid: Tensor) -> Tensor:
    """``(r - min + 1e-6) / (max - min)`` over the valid tokens of each row of (B, N); 1 where all are equal."""
    low = relevance.masked_fill(~valid, float("inf")).amin(1, keepdim=True)
    high = relevance.masked_fill(~valid, float("-inf")).amax(1, keepdim=True)
    spread = high - low
    return torch.where(spread > 0, (relevance - low + 1e-6) / spread.clamp(min=1e-12), 1.0).masked_fill(~valid, 0.0)
