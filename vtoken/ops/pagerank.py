# SPDX-License-Identifier: Apache-2.0
"""Importance of tokens as the stationary flow of attention."""

from __future__ import annotations

import torch
from torch import Tensor


def page_rank(
    logits: Tensor,
    temperature: float = 0.1,
    iterations: int = 5,
    damping: float = 0.0,
    valid: Tensor | None = None,
) -> Tensor:
    """Follow attention from a uniform start: ``p <- p softmax(logits / temperature)`` (AIM, arXiv 2412.03248, Eq. 4).

    Parameters
    ----------
    logits : Tensor
        (..., H, L, L): scores of queries (rows) and keys before the softmax, -inf where hidden.
    temperature : float
        Of the softmax; 0.1 in the authors' code, not in the paper.
    iterations : int
        Steps along the attention.
    damping : float
        Share of the uniform start mixed in at each step.
    valid : Tensor, optional
        (..., L) bool: tokens that take part; all if omitted.

    Returns
    -------
    Tensor
        (..., L): root mean square over the heads, 0 for tokens that take no part.

    Raises
    ------
    ValueError
        If the temperature or the number of iterations is out of range, or a logit is NaN.
    """
    if temperature <= 0 or iterations < 1 or not 0 <= damping <= 1:
        raise ValueError(
            f"temperature={temperature}, iterations={iterations}, damping={damping}: "
            "give a positive temperature, at least 1 iteration and a damping in [0, 1]."
        )
    if bool(logits.isnan().any()):
        raise ValueError("The attention logits hold NaN: check the model's dtype (float16 overflows) and its inputs.")
    logits = logits.float()
    length = logits.shape[-1]
    if valid is None:
        valid = torch.ones(*logits.shape[:-3], length, dtype=torch.bool, device=logits.device)
    seen = valid[..., None, None, :]
    # a query that sees nothing has no finite logit: its row is 0, not NaN
    step = (logits / temperature).masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
    uniform = (valid.float() / valid.sum(-1, keepdim=True).clamp(min=1))[..., None, None, :]
    flow = uniform.expand(*logits.shape[:-2], 1, length)
    for _ in range(iterations):
        flow = (flow @ step) * (1 - damping) + damping * uniform
    return flow[..., 0, :].square().mean(-2).sqrt()
