# SPDX-License-Identifier: Apache-2.0
"""Token-level correlation-guided compression: crops keep as much as they hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtoken.budget import share_out
from vtoken.context import VisualContext
from vtoken.encoder import EncoderRead
from vtoken.ops import top_k
from vtoken.ops.common import index_mask, unit_vectors
from vtoken.ops.cosines import CHUNK
from vtoken.reducers.base import Assignment, MergeReducer
from vtoken.reducers.checks import check_block, check_count, check_number
from vtoken.reducers.encoded import EncoderReducer
from vtoken.reducers.prumerge import outliers
from vtoken.reducers.views import Views
from vtoken.reducers.visionzip import join
from vtoken.registry import register


@register("tokencorr")
@dataclass(frozen=True)
class TokenCorr(EncoderReducer, MergeReducer):
    """Token-level correlation-guided compression (arXiv 2407.14439), as far as it is published.

    The budget goes to the views by their information density, the share of patches that are not redundant: a patch
    is, if too many others have a similar key. A view keeps the outliers of a deep layer's attention, then samples from
    a shallow layer's attention; the other tokens are averaged into the kept one with the most similar key. The paper
    leaves layers, both thresholds, the kind of sampling (here without replacement) and the weights of the average
    open, and there is no code: these are choices, without any claim to its numbers.

    Parameters
    ----------
    similarity : float
        Cosine of keys above which two patches are alike.
    limit : float
        A patch is redundant if more than this share of its view is like it.
    shallow : int or float
        Block of the vision tower to sample from: its index, or a share of its depth.
    layer : int or float
        Deep block, and that of the keys.
    seed : int
        Of the sampling.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """

    summary = "Outliers and samples of attention, more of them where patches differ."
    paper = "2407.14439"
    reads = ("best", "keys")

    similarity: float = 0.8
    limit: float = 0.05
    shallow: int | float = 0.34
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("similarity", self.similarity, -1, 1)
        check_number("limit", self.limit, 0, 1)
        check_block("shallow", self.shallow)
        check_count("seed", self.seed, least=0)

    def encoder_reads(self) -> tuple[EncoderRead, ...]:
        return *super().encoder_reads(), EncoderRead("best", self.shallow)

    def assign(self, ctx: VisualContext, budget: Tensor) -> Assignment:
        """Keep outliers and samples, send the others to the kept token with the most similar key."""
        views = Views.of(ctx)
        deep, shallow = (views.take(self.read_scores(ctx, "best", layer)) for layer in (self.layer, self.shallow))
        keys, counts = views.take(self.read(ctx, "keys")), views.counts
        dense = density(keys, views.valid, self.similarity, self.limit).view(counts.shape)
        quota = share_out(torch.minimum(budget, counts.sum(1)), dense * counts, counts).flatten()
        kept = self._choose(deep, shallow, quota, views.valid)
        source = join(keys, kept, kept, views.valid)
        return Assignment(views.scatter(source, ctx.longest))

    def _choose(self, deep: Tensor, shallow: Tensor, quota: Tensor, valid: Tensor) -> Tensor:
        """(G, M) bool: outliers of ``deep``, then samples of ``shallow``."""
        head = torch.minimum(outliers(deep, valid), quota)
        rank = deep.masked_fill(~valid, float("-inf")).sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
        first = (rank < head[:, None]) & valid
        # the largest of log p + Gumbel noise are a sample without replacement
        noise = torch.stack([self._gumbel(len(row), int(row.sum())) for row in valid.cpu()]).to(deep.device)
        draw = shallow.clamp(min=1e-12).log() + noise
        return first | index_mask(top_k(draw, quota - head, valid & ~first), valid.shape[1])

    def _gumbel(self, longest: int, tokens: int) -> Tensor:
        """Noise (longest,) that depends on the seed and the number of tokens alone."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + tokens)
        noise = torch.rand(tokens, generator=generator, dtype=torch.float32, device="cpu").clamp(min=1e-12)
        return torch.nn.functional.pad(-(-noise.log()).clamp(min=1e-12).log(), (0, longest - tokens))


def density(keys: Tensor, valid: Tensor, similarity: float, limit: float) -> Tensor:
    """(B,): share of the valid tokens of each row that are not redundant.

    Parameters
    ----------
    keys : Tensor
        (B, N, c).
    valid : Tensor
        (B, N) bool.
    similarity, limit : float
        As in `TokenCorr`.
    """
    unit = unit_vectors(keys, valid, "keys")
    alike = torch.cat([((part @ unit.mT) > similarity).sum(2) - 1 for part in unit.split(CHUNK, 1)], 1)
    count = valid.sum(1, keepdim=True).clamp(min=1)
    redundant = (alike > limit * count.float()) & valid
    return 1 - redundant.sum(1).float() / count[:, 0]
