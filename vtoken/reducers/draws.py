# SPDX-License-Identifier: Apache-2.0
"""Random numbers that an image gets in any batch."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(seed: int, tokens: int, count: int) -> Tensor:
    """(count,) float32 in [0, 1), the same for every image of so many tokens; made on the host."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + tokens)
    return torch.rand(count, generator=generator, dtype=torch.float32, device="cpu")
