# SPDX-License-Identifier: Apache-2.0
"""How much an answer changes if visual tokens leave at each layer: what the fixed exit is calibrated with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vtoken.adapters import adapter_for
from vtoken.reducers.vtw import VTW
from vtoken.wrapping import reduce


@torch.no_grad()
def exit_divergence(model: nn.Module, prompt: Mapping[str, Any]) -> Tensor:
    """Kullback-Leibler divergence of the next token without visual tokens against the full model's.

    ``VTW(calibrated_layer(...))`` takes the mean of it over samples, 20 of them in VTW (arXiv 2405.05803).

    Parameters
    ----------
    model : nn.Module
        An unwrapped model that `vtoken.adapters` knows.
    prompt : mapping
        What its processor returned, left padded.

    Returns
    -------
    Tensor
        (B, L): without visual tokens from that layer on; infinite for layer 0, before which nothing has been read.
    """
    full = _next_token(model, prompt)
    out = full.new_full((len(full), len(adapter_for(model).layers)), float("inf"))
    for layer in range(1, out.shape[1]):
        with reduce(model, VTW(layer)):
            blind = _next_token(model, prompt)
        out[:, layer] = functional.kl_div(blind, full, log_target=True, reduction="none").sum(1)
    return out


def _next_token(model: nn.Module, prompt: Mapping[str, Any]) -> Tensor:
    """(B, V) log-probabilities of the token behind the prompt."""
    return model(**{**prompt, "use_cache": False}).logits[:, -1].float().log_softmax(1)
