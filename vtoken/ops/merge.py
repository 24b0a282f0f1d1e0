# SPDX-License-Identifier: Apache-2.0
"""Merging tokens: bipartite soft matching and density-peak clusters."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vtoken.ops.common import counts, finite, mask_of, unit_vectors
from vtoken.ops.topk import top_k


class Merged(NamedTuple):
    """Result of a merge.

    Attributes
    ----------
    features : Tensor
        (B, M, C): rows of merged tokens, zero on the padding.
    source : Tensor
        (B, N) long: the row each token went into, -1 for a token that is not valid.
    """

    features: Tensor
    source: Tensor


def merge_rows(x: Tensor, source: Tensor, rows: int, sizes: Tensor | None = None) -> Tensor:
    """Mean of the tokens of each row, weighted by their sizes.

    Parameters
    ----------
    x : Tensor
        (B, N, C).
    source : Tensor
        (B, N) long in [-1, rows).
    rows : int
        M.
    sizes : Tensor, optional
        (B, N) weights; equal if omitted.

    Returns
    -------
    Tensor
        (B, M, C) float32, zero for a row without tokens.
    """
    weight = torch.ones_like(source, dtype=torch.float32) if sizes is None else sizes.float()
    weight = weight.masked_fill(source < 0, 0.0)
    total = row_sizes(source, rows, weight)
    index = torch.where(source < 0, rows, source)[..., None].expand(-1, -1, x.shape[2])
    summed = x.new_zeros(len(x), rows + 1, x.shape[2], dtype=torch.float32)
    summed.scatter_add_(1, index, x.float().masked_fill((source < 0)[..., None], 0.0) * weight[..., None])
    return summed[:, :rows] / torch.where(total > 0, total, 1.0)[..., None]


def row_sizes(source: Tensor, rows: int, sizes: Tensor | None = None) -> Tensor:
    """(B, M) float32: how many patches stand behind each row of a merge; arguments as in `merge_rows`."""
    weight = torch.ones_like(source, dtype=torch.float32) if sizes is None else sizes.float()
    total = weight.new_zeros(len(source), rows + 1)
    return total.scatter_add_(1, torch.where(source < 0, rows, source), weight)[:, :rows]


def bipartite_merge(
    metric: Tensor,
    x: Tensor,
    r: int | Tensor,
    sizes: Tensor | None = None,
    valid: Tensor | None = None,
    protect_first: bool = False,
) -> Merged:
    """Merge the ``r`` most similar (even, odd) pairs of tokens (ToMe, arXiv 2210.09461; AIM, arXiv 2412.03248).

    Tokens at even places are linked to the odd-placed token of highest cosine; the ``r`` closest of them are averaged
    into it. Rows come out as the authors emit them: the even tokens that stay, by descending similarity, then the odd
    ones in order.

    Parameters
    ----------
    metric : Tensor
        (B, N, c): what similarity is measured on.
    x : Tensor
        (B, N, C): what is averaged.
    r : int or Tensor
        Pairs to merge, or (B,) long; at most half of the tokens are.
    sizes : Tensor, optional
        (B, N) weights of the mean (ToMe); equal if omitted (AIM).
    valid : Tensor, optional
        (B, N) bool, all True values in front: tokens of ragged rows.
    protect_first : bool
        Never merge token 0, a [CLS] token, and keep the even tokens in order (ToMe).

    Returns
    -------
    Merged
        ``features`` (B, M, C), M the longest row, and ``source``.

    Raises
    ------
    ValueError
        If a valid token is not finite, ``r`` is negative, or ``valid`` has holes.
    """
    valid = mask_of(metric, valid)
    if bool((valid[:, 1:] & ~valid[:, :-1]).any()):
        raise ValueError("valid has holes: bipartite_merge takes the tokens of each row in front.")
    tokens = valid.sum(1)
    r = counts(r, valid)
    r = torch.minimum(r, (tokens - int(protect_first)).clamp(min=0) // 2)
    unit = unit_vectors(metric, valid, "metric values")
    even, odd = unit[:, 0::2], unit[:, 1::2]
    if odd.shape[1] == 0:
        return Merged(finite(x, valid, "features"), torch.where(valid, 0, -1))
    scores = (even @ odd.mT).masked_fill(~valid[:, None, 1::2], float("-inf"))
    best, partner = scores.max(2)
    best = best.masked_fill(~valid[:, 0::2], float("-inf"))
    if protect_first:
        best[:, 0] = float("-inf")
    source = torch.full_like(valid, -1, dtype=torch.long)
    stay = (tokens + 1) // 2 - r
    place = _places(best, valid[:, 0::2], r, in_order=protect_first)
    source[:, 1::2] = stay[:, None] + torch.arange(odd.shape[1], device=r.device)
    source[:, 0::2] = torch.where(place < 0, stay[:, None] + partner, place)
    source = source.masked_fill(~valid, -1)
    rows = int((tokens - r).max())
    return Merged(merge_rows(finite(x, valid, "features"), source, rows, sizes), source)


def _places(best: Tensor, valid: Tensor, r: Tensor, in_order: bool) -> Tensor:
    """(B, E) long: output place of the even tokens that stay, -1 of those that are merged."""
    rank = best.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
    merged = rank < r[:, None]
    place = (valid & ~merged).cumsum(1) - 1 if in_order else rank - r[:, None]
    return torch.where(merged, -1, place)


def density_peaks(features: Tensor, k: int | Tensor, valid: Tensor | None = None) -> Tensor:
    """Cluster centres by density peaks over k nearest neighbours (DPC-kNN, as in SparseVLM, arXiv 2410.04417).

    Density is ``exp(-mean of the k smallest squared distances)``, the token itself included; a centre has a high
    product of density and distance to the nearest denser token.

    Parameters
    ----------
    features : Tensor
        (B, N, D).
    k : int or Tensor
        Clusters, and neighbours, or (B,) long.
    valid : Tensor, optional
        (B, N) bool.

    Returns
    -------
    Tensor
        (B, max k) long, strongest centre first, padded with -1.
    """
    valid = mask_of(features, valid)
    count = counts(k, valid)
    distance = _distances(finite(features, valid, "features")).masked_fill(~valid[:, None], float("inf"))
    near = distance.sort(dim=2).values.square()[..., : int(count.max())]
    among = torch.arange(near.shape[2], device=count.device) < count[:, None]
    mean = near.masked_fill(~among[:, None], 0.0).sum(2) / count.clamp(min=1)[:, None]
    density = (-mean).exp().masked_fill(~valid, -1.0)
    index = torch.arange(valid.shape[1], device=valid.device)
    # equal densities: the lower index counts as denser, so that identical tokens have one peak and not none
    denser = (density[:, None] > density[..., None]) | (
        (density[:, None] == density[..., None]) & (index[None] < index[:, None])
    )
    farthest = distance.masked_fill(~valid[:, None] | ~valid[..., None], 0.0).amax((1, 2))
    peak = distance.masked_fill(~denser, float("inf")).amin(2)
    peak = torch.where(peak.isinf(), farthest[:, None], peak)
    return top_k(torch.where(valid, peak * density, 0.0), count, valid)


def _distances(features: Tensor) -> Tensor:
    """(B, N, N) Euclidean distance over the root of the channels."""
    return torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist") / features.shape[2] ** 0.5


def cluster_merge(features: Tensor, k: int | Tensor, valid: Tensor | None = None) -> Merged:
    """Average tokens around the centres of `density_peaks`, each into the nearest one.

    Parameters are those of `density_peaks`.

    Returns
    -------
    Merged
        ``features`` (B, max k, D) in the order of the centres, and ``source``.

    Raises
    ------
    ValueError
        If a valid token is not finite, or ``k`` is negative.
    """
    valid = mask_of(features, valid)
    centres = density_peaks(features, k, valid)
    x = finite(features, valid, "features")
    picked = x.gather(1, centres.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
    gap = torch.cdist(x, picked, compute_mode="donot_use_mm_for_euclid_dist")
    source = gap.masked_fill((centres < 0)[:, None], float("inf")).argmin(2)
    mine = torch.arange(centres.shape[1], device=x.device).expand_as(centres)
    spare = torch.where(centres < 0, x.shape[1], centres)  # a centre stays in its own cluster, also beside its twin
    source = torch.cat([source, source[:, :1]], 1).scatter_(1, spare, mine)[:, :-1].masked_fill(~valid, -1)
    return Merged(merge_rows(x, source, centres.shape[1]), source)
