# SPDX-License-Identifier: Apache-2.0
"""Plain references: one row at a time, the full matrix of cosines, Python loops, double precision."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def cosines(x: Tensor) -> Tensor:
    unit = functional.normalize(x.double(), dim=1, eps=1e-8)
    return unit @ unit.T


def best(scores: dict[int, float]) -> int:
    """The key with the largest value, the lowest on ties."""
    return max(scores, key=lambda i: (scores[i], -i))


def greedy(n: int, k: int, first: dict[int, float], score) -> list[int]:
    picks: list[int] = []
    while len(picks) < min(k, n):
        left = {i: (score(i, picks) if picks else first[i]) for i in range(n) if i not in picks}
        picks.append(best(left))
    return picks


def top_k(scores: Tensor, k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:k]


def k_center(x: Tensor, k: int, start: int = 0) -> list[int]:
    cos = cosines(x)
    first = {i: float(i == start) for i in range(len(x))}
    return greedy(len(x), k, first, lambda i, picks: min(1 - float(cos[i, j]) for j in picks))


def max_sum(x: Tensor, k: int, start: int = 0) -> list[int]:
    cos = cosines(x)
    first = {i: float(i == start) for i in range(len(x))}
    return greedy(len(x), k, first, lambda i, picks: -sum(float(cos[i, j]) for j in picks))


def max_min(x: Tensor, k: int) -> list[int]:
    cos, n = cosines(x), len(x)
    first = {i: min([1 - float(cos[i, j]) for j in range(n) if j != i], default=2.0) for i in range(n)}
    return greedy(n, k, first, lambda i, picks: min(1 - float(cos[i, j]) for j in picks))


def mmr(x: Tensor, importance: Tensor, k: int, lam: float, parallel: int = 1) -> list[int]:
    cos, n = cosines(x), len(x)
    s = importance.double()
    s = (s - s.min()) / (s.max() - s.min() + 1e-6)
    picks: list[int] = []
    while len(picks) < min(k, n):
        seen = list(picks)
        for _ in range(min(parallel, k - len(picks), n - len(picks))):
            left = {
                i: lam * float(s[i]) - (1 - lam) * max(float(cos[i, j]) for j in seen) if seen else float(s[i])
                for i in range(n)
                if i not in picks
            }
            picks.append(best(left))
    return picks


def sads(x: Tensor, weights: Tensor, k: int) -> list[int]:
    cos, w = cosines(x), weights.double()
    first = {i: float(w[i]) for i in range(len(x))}
    return greedy(len(x), k, first, lambda i, picks: float(w[i]) * min(1 - float(cos[i, j]) for j in picks))


def dpp(x: Tensor, relevance: Tensor, k: int) -> list[int]:
    r = relevance.double()
    return by_determinants(r[:, None] * cosines(x) * r, k)


def log_det(x: Tensor, k: int, gamma: float) -> list[int]:
    gram = x.double() @ x.double().T
    return by_determinants(torch.eye(len(x), dtype=torch.double) + gamma * gram @ gram.T, k)


def by_determinants(kernel: Tensor, k: int) -> list[int]:
    picks: list[int] = []
    while len(picks) < min(k, len(kernel)):
        sets = {i: [*picks, i] for i in range(len(kernel)) if i not in picks}
        gains = {i: float(torch.linalg.det(kernel[s][:, s])) for i, s in sets.items()}
        picks.append(best(gains))
    return picks


def coverage(x: Tensor, importance: Tensor, k: int, alpha: float, combine: str) -> list[int]:
    cos, w = cosines(x), importance.double() ** alpha
    picks: list[int] = []
    while len(picks) < min(k, len(x)):
        cover = cos[:, picks].amax(1).clamp(min=0) if picks else torch.zeros(len(x), dtype=torch.double)
        gains = {}
        for i in range(len(x)):
            if i not in picks:
                gain = float((cos[:, i] - cover).clamp(min=0).sum())
                gains[i] = gain + float(w[i]) if combine == "add" else gain * float(w[i])
        picks.append(best(gains))
    return picks


def bipartite(metric: Tensor, x: Tensor, r: int, sizes: Tensor | None = None) -> tuple[Tensor, list[int]]:
    cos, n = cosines(metric), len(x)
    r = min(r, n // 2)
    even, odd = list(range(0, n, 2)), list(range(1, n, 2))
    partner = {i: best({j: float(cos[i, j]) for j in odd}) for i in even} if odd else {}
    order = sorted(even, key=lambda i: (-float(cos[i, partner[i]]), i)) if odd else even
    merged = order[:r]
    rows = order[r:] + odd
    source = [rows.index(partner[i]) if i in merged else rows.index(i) for i in range(n)]
    weight = torch.ones(n) if sizes is None else sizes
    out = []
    for row in range(len(rows)):
        members = [i for i in range(n) if source[i] == row]
        w = weight[members].double()
        out.append((x[members].double() * w[:, None]).sum(0) / w.sum())
    return torch.stack(out), source


def clusters(x: Tensor, k: int) -> tuple[list[int], list[int]]:
    """Centres and the cluster of each token by density peaks."""
    n, gap = len(x), torch.cdist(x.double(), x.double()) / math.sqrt(x.shape[1])
    near = gap.sort(1).values[:, :k]
    density = [math.exp(-float((row**2).mean())) for row in near]
    peak = []
    for i in range(n):
        denser = [float(gap[i, j]) for j in range(n) if (density[j], -j) > (density[i], -i)]
        peak.append(min(denser) if denser else float(gap.max()))
    centres = top_k(torch.tensor([p * d for p, d in zip(peak, density, strict=True)], dtype=torch.double), k)
    source = [min(range(k), key=lambda c: (float(gap[i, centres[c]]), c)) for i in range(n)]
    for number, centre in enumerate(centres):
        source[centre] = number
    return centres, source


def page_rank(logits: Tensor, temperature: float, iterations: int, damping: float) -> Tensor:
    heads, n, _ = logits.shape
    total = torch.zeros(n, dtype=torch.double)
    for h in range(heads):
        step = (logits[h].double() / temperature).softmax(1)
        flow = torch.full((n,), 1 / n, dtype=torch.double)
        for _ in range(iterations):
            flow = torch.stack([(flow * step[:, j]).sum() for j in range(n)]) * (1 - damping) + damping / n
        total += flow**2
    return (total / heads).sqrt()
