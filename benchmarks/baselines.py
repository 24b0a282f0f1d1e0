# SPDX-License-Identifier: Apache-2.0
"""The greedy selections as their papers write them: one matrix of all cosines, then a loop over the picks.

One row of tokens at a time, float32, any device. Written from the equations; the papers' codes have the same structure.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize


def cosines(features: Tensor) -> Tensor:
    """(N, N) similarities of (N, D)."""
    unit = normalize(features.float(), dim=-1)
    return unit @ unit.T


def k_center(features: Tensor, k: int) -> Tensor:
    """Largest smallest distance to the picks, from token 0 (arXiv 2505.18757 v1)."""
    distance = 1 - cosines(features)
    picks = [0]
    nearest = distance[0].clone()
    while len(picks) < k:
        nearest[picks] = float("-inf")
        picks.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distance[picks[-1]])
    return torch.tensor(picks)


def max_sum(features: Tensor, k: int) -> Tensor:
    """Largest summed distance to the picks, from token 0 (arXiv 2505.18757, Eq. 4-6)."""
    similarity = cosines(features)
    picks = [0]
    total = similarity[0].clone()
    while len(picks) < k:
        total[picks] = float("inf")
        picks.append(int(total.argmin()))
        total = total + similarity[picks[-1]]
    return torch.tensor(picks)


def max_min(features: Tensor, k: int) -> Tensor:
    """Largest smallest distance to the picks, from the token farthest from its neighbour (arXiv 2503.02175)."""
    distance = 1 - cosines(features)
    distance.fill_diagonal_(float("inf"))
    picks = [int(distance.amin(1).argmax())]
    nearest = distance[picks[0]].clone()
    while len(picks) < k:
        nearest[picks] = float("-inf")
        picks.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distance[picks[-1]])
    return torch.tensor(picks)


def mmr(features: Tensor, importance: Tensor, k: int, lam: float = 0.5) -> Tensor:
    """Maximal marginal relevance (arXiv 2602.13315)."""
    similarity = cosines(features)
    weight = (importance - importance.min()) / (importance.max() - importance.min() + 1e-6)
    picks = [int(weight.argmax())]
    nearest = similarity[picks[0]].clone()
    while len(picks) < k:
        scores = lam * weight - (1 - lam) * nearest
        scores[picks] = float("-inf")
        picks.append(int(scores.argmax()))
        nearest = torch.maximum(nearest, similarity[picks[-1]])
    return torch.tensor(picks)


def sads(features: Tensor, weights: Tensor, k: int) -> Tensor:
    """Sensitivity times the smallest distance to the picks (arXiv 2509.24837)."""
    distance = 1 - cosines(features)
    picks = [int(weights.argmax())]
    nearest = distance[picks[0]].clone()
    while len(picks) < k:
        scores = weights * nearest
        scores[picks] = float("-inf")
        picks.append(int(scores.argmax()))
        nearest = torch.minimum(nearest, distance[picks[-1]])
    return torch.tensor(picks)


def dpp(features: Tensor, relevance: Tensor, k: int) -> Tensor:
    """Greedy determinant maximisation with Cholesky rows (arXiv 2506.10967; the update is that of arXiv 1709.05135)."""
    return _largest_determinant(relevance[:, None] * cosines(features) * relevance, k)


def _largest_determinant(kernel: Tensor, k: int) -> Tensor:
    variance = kernel.diagonal().clone()
    rows = kernel.new_zeros(k, len(kernel))
    picks: list[int] = []
    for step in range(k):
        picks.append(int(variance.argmax()))
        best = picks[-1]
        rows[step] = (kernel[best] - rows[:step, best] @ rows[:step]) / variance[best].sqrt()
        variance = variance - rows[step].square()
        variance[picks] = float("-inf")
    return torch.tensor(picks)


def coverage(features: Tensor, importance: Tensor, k: int) -> Tensor:
    """Gain in coverage times importance, of every candidate at every step (arXiv 2510.24214)."""
    similarity = cosines(features)
    cover = similarity.new_zeros(len(similarity))
    picks: list[int] = []
    while len(picks) < k:
        scores = (similarity - cover).clamp(min=0).sum(1) * importance
        scores[picks] = float("-inf")
        picks.append(int(scores.argmax()))
        cover = torch.maximum(cover, similarity[picks[-1]])
    return torch.tensor(picks)


def log_det(features: Tensor, k: int, gamma: float = 0.01) -> Tensor:
    """Greedy determinant of ``I + gamma G Gᵀ`` with ``G = x xᵀ`` (arXiv 2602.20205), with the same rows."""
    x = features.float()
    gram = x @ x.T
    kernel = gamma * gram @ gram.T
    kernel.diagonal().add_(1)
    return _largest_determinant(kernel, k)


def thinning(features: Tensor, order: Tensor, target: int, step: int = 8) -> Tensor:
    """Of the tokens ``order``, those left when every second one that is most like one between is removed (2412.01818).

    In rounds of at most ``step`` removals.
    """
    similarity = cosines(features)
    while len(order) > target:
        even, odd = order[0::2], order[1::2]
        ranked = similarity[even][:, odd].amax(1).argsort(dim=0, descending=True, stable=True)
        remove = min(step, len(order) - target, len(even))
        order = torch.cat([even[ranked[remove:]], odd])
    return order


BASELINES: dict[str, Callable[..., Tensor]] = {
    "k_center": k_center,
    "max_sum": max_sum,
    "max_min": max_min,
    "mmr": mmr,
    "sads": sads,
    "dpp": dpp,
    "log_det": log_det,
    "coverage": coverage,
}
WEIGHTED = ("mmr", "sads", "dpp", "coverage")
"""Those that also take one weight a token."""
