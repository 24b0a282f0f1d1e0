# SPDX-License-Identifier: Apache-2.0
"""What every operation does first: counts, masks, unit vectors, and sentences for input that has no answer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

EPS = 1e-8
"""Smallest norm: a zero vector has cosine 0 with everything."""


def mask_of(values: Tensor, valid: Tensor | None) -> Tensor:
    """(B, N) bool: ``valid``, or all True for ``values`` (B, N, ...)."""
    if valid is None:
        return torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
    if valid.shape != values.shape[:2]:
        raise ValueError(f"valid has shape {tuple(valid.shape)}, but the tokens have {tuple(values.shape[:2])}.")
    return valid.to(device=values.device, dtype=torch.bool)


def counts(k: int | Tensor, valid: Tensor) -> Tensor:
    """(B,) long: ``k`` of each row, at most its valid tokens.

    Raises
    ------
    ValueError
        If a count is negative, or there is not one count a row.
    """
    wanted = torch.as_tensor(k, device=valid.device).long()
    if wanted.dim() > 1 or (wanted.dim() == 1 and wanted.shape[0] != valid.shape[0]):
        raise ValueError(f"k has shape {tuple(wanted.shape)}: give an int, or one count for each of {len(valid)} rows.")
    if bool((wanted < 0).any()):
        raise ValueError(f"k={wanted.min().item()} is negative: give a count of at least 0.")
    return torch.minimum(wanted.expand(valid.shape[0]), valid.sum(1))


def finite(values: Tensor, valid: Tensor, what: str) -> Tensor:
    """``values`` (B, N, ...) in float32, zero where not ``valid``.

    Raises
    ------
    ValueError
        If a valid token has a value that is not finite.
    """
    bad = ~values.isfinite()
    bad = (bad.flatten(2).any(2) if bad.dim() > 2 else bad) & valid
    if bool(bad.any()):
        row, token = bad.nonzero()[0].tolist()
        raise ValueError(
            f"The {what} of token {token} in row {row} are not finite: check the model's dtype (float16 overflows) "
            "and its inputs."
        )
    return values.float().masked_fill(~valid.view(*valid.shape, *[1] * (values.dim() - 2)), 0.0)


def unit_vectors(features: Tensor, valid: Tensor, what: str = "features") -> Tensor:
    """(B, N, D) float32 of length 1, zero where not ``valid``."""
    return functional.normalize(finite(features, valid, what), dim=-1, eps=EPS)


def first_picks(picked: Tensor, count: Tensor) -> Tensor:
    """The first ``count`` (B,) picks of each row of (B, K), -1 behind them."""
    return torch.where(torch.arange(picked.shape[1], device=picked.device) < count[:, None], picked, -1)


def index_mask(index: Tensor, length: int) -> Tensor:
    """(B, length) bool: the entries that ``index`` (B, K) names, -1 ignored."""
    out = torch.zeros(len(index), length + 1, dtype=torch.bool, device=index.device)
    return out.scatter_(1, torch.where(index < 0, length, index), True)[:, :-1]


def first_of(mask: Tensor) -> Tensor:
    """(B,) long: the first True of each row of ``mask`` (B, N), 0 if there is none."""
    return mask.to(torch.uint8).argmax(1)
