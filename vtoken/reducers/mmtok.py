# SPDX-License-Identifier: Apache-2.0
"""MMTok: tokens that cover both the words of the question and the rest of the picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vtoken.context import VisualContext
from vtoken.ops import cover
from vtoken.ops.common import EPS, unit_vectors
from vtoken.ops.cosines import CHUNK, Cosines
from vtoken.ops.ragged import gather
from vtoken.precision import selection
from vtoken.reducers.base import SelectReducer
from vtoken.reducers.checks import check_choice, check_number
from vtoken.reducers.rows import question_rows
from vtoken.reducers.views import Views
from vtoken.reducers.visual import VISUAL, visual_features
from vtoken.registry import register


@register("mmtok")
@dataclass(frozen=True)
class MMTok(SelectReducer):
    """MMTok (arXiv 2508.18264): maximum coverage of the text and of the picture by the kept tokens.

    A visual token covers a word by its share of the softmax of their cosines, on projected features and input
    embeddings, and another visual token by the same measure on the features before the projector. The greedy choice
    adds most to the sum of what is covered best. Each view gets the same budget, and covers itself.

    The authors embed the words of the question alone. Here the text is that behind the last picture of the prompt,
    with what the chat template puts there; all text where there is none.

    Parameters
    ----------
    alpha : float
        Weight of covering the picture.
    tau_t, tau_v : float
        Temperatures for text and picture; the authors take 0.01 instead of 0.02 for text in Qwen models.
    visual : str
        What the picture is covered on: ``"tower"``, the projector's input, or ``"projected"``, its output, for models
        whose projector merges tokens.

    Raises
    ------
    ValueError
        If a parameter is out of range or unknown.
    """

    summary = "Maximum coverage of the question's words and of the picture."
    paper = "2508.18264"
    uses_text = True
    positions = "compact"

    alpha: float = 0.5
    tau_t: float = 0.02
    tau_v: float = 0.2
    visual: str = "tower"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, 0)
        check_number("tau_t", self.tau_t, 0, above=True)
        check_number("tau_v", self.tau_v, 0, above=True)
        check_choice("visual", self.visual, VISUAL)
        object.__setattr__(self, "needs_projector", self.visual == "tower")

    def select(self, ctx: VisualContext, budget: Tensor) -> Tensor:
        """Slots (I, K) in pick order, view by view."""
        views = Views.of(ctx)
        index, real = question_rows(ctx)
        owner = ctx.row.clamp(min=0).repeat_interleave(views.slots.shape[1])
        text = gather(ctx.hidden, index)
        x = views.take(ctx.features)
        tower = views.take(visual_features(ctx, self.visual, self.name))
        quota = views.share(budget, equal=True)
        return views.pick(
            cover_both(
                x, tower, text[owner], quota, views.valid, real[owner], (self.tau_t, self.tau_v), alpha=self.alpha
            )
        )


@selection
def cover_both(
    x: Tensor,
    tower: Tensor,
    text: Tensor,
    k: int | Tensor,
    valid: Tensor,
    real: Tensor,
    temperatures: tuple[float, float] = (0.02, 0.2),
    alpha: float = 0.5,
    free: Tensor | None = None,
) -> Tensor:
    """Greedy maximum coverage of the rows of ``[P; alpha Q]``.

    ``P = softmax(text xᵀ / tau_t) / M`` and ``Q = softmax(tower towerᵀ / tau_v) / N`` on unit vectors, both over the
    valid tokens. Columns of Q are made when they are looked at: no (N, N) matrix where N is large.

    Parameters
    ----------
    x : Tensor
        (B, N, D) projected tokens.
    tower : Tensor
        (B, N, C) the same before the projector.
    text : Tensor
        (B, M, D).
    k : int or Tensor
        How many, or (B,) long.
    valid, real : Tensor
        (B, N) and (B, M) bool.
    temperatures : tuple
        tau_t and tau_v.
    alpha : float
        Weight of Q.
    free : Tensor, optional
        (B, N) bool: valid tokens that can be chosen, where others are only covered (the authors' padding).

    Returns
    -------
    Tensor
        (B, max k) long in pick order, padded with -1.

    Raises
    ------
    ValueError
        If a token is not finite.
    """
    tau_t, tau_v = temperatures
    words = functional.normalize(text.float().masked_fill(~real[..., None], 0.0), dim=2, eps=EPS)
    logits = (words @ unit_vectors(x, valid).mT / tau_t).masked_fill(~valid[:, None], float("-inf"))
    by_word = logits.softmax(2).masked_fill(~real[..., None], 0.0).nan_to_num()  # NaN: a row without tokens
    by_word = (by_word / real.sum(1).clamp(min=1)[:, None, None]).mT.contiguous()
    picture = _Softmaxed(tower, valid, tau_v, alpha)

    def columns(index: Tensor) -> Tensor:
        return torch.cat([gather(by_word, index), picture.columns(index)], 2)

    return cover(columns, text.shape[1] + x.shape[1], k, valid if free is None else free)


class _Softmaxed:
    """Columns of ``alpha softmax(cos / tau) / N``; rows and columns are the valid tokens."""

    def __init__(self, features: Tensor, valid: Tensor, tau: float, alpha: float) -> None:
        self.cosines = Cosines(features, valid).whole()
        self.valid, self.tau = valid, tau
        self.scale = (alpha / valid.sum(1).clamp(min=1))[:, None, None]
        tokens = torch.arange(valid.shape[1], device=valid.device)
        self.total = torch.cat([self._logits(part).logsumexp(2) for part in tokens.split(CHUNK)], 1)[:, None]

    def _logits(self, tokens: Tensor) -> Tensor:
        logits = self.cosines.columns(tokens.expand(len(self.valid), -1)) / self.tau
        return logits.masked_fill(~self.valid[:, None], float("-inf"))

    def columns(self, index: Tensor) -> Tensor:
        """(B, P, N) of the columns ``index`` (B, P)."""
        found = (self.cosines.columns(index) / self.tau - self.total).exp() * self.scale
        return found.masked_fill(~self.valid[:, None], 0.0)
