# SPDX-License-Identifier: Apache-2.0
"""ZOO-Prune: tokens whose projection reacts most to small changes, kept apart from each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from vtoken.context import VisualContext
from vtoken.ops import sads
from vtoken.ops.greedy import scaled
from vtoken.reducers.base import SelectReducer
from vtoken.reducers.checks import check_count, check_number
from vtoken.reducers.views import Views
from vtoken.registry import register

CHUNK = 2**24  # numbers a perturbed batch may hold


@register("zooprune")
@dataclass(frozen=True)
class ZOOPrune(SelectReducer):
    """ZOO-Prune (arXiv 2509.24837): zeroth-order sensitivity of the projector times diversity of its output.

    The sensitivity of a token is the mean over random directions of ``|M(x + h u) - M(x - h u)| / 2h``; greedy
    selection then maximises sensitivity times distance to the tokens kept so far, with the same budget in each view.
    Three things differ from the authors' code: sensitivities are computed in float32 with the model's own projector
    (in half precision most of a perturbation of 0.01 is rounded away; their LLaVA-NeXT code replaces the projector),
    directions are seeded, and the newlines that stay are the true ones.

    Where a projector makes one token of s x s patches (Qwen-VL's merger, InternVL's pixel shuffle), the patches of a
    token are perturbed together, by one direction of length h in the space of all of them. The authors publish no code
    for such projectors; this is the same formula with the token's whole input as ``x``. A projector that mixes patches
    of several tokens, or resamples them inside, has no input of a single token and is refused.

    Parameters
    ----------
    directions : int
        Random directions, shared by all tokens.
    step : float
        Length h of a perturbation.
    seed : int
        Of the directions.

    Raises
    ------
    ValueError
        If a parameter is out of range, or the model's projector has no input of a single token.
    """

    summary = "Sensitivity of the projector times diversity."
    paper = "2509.24837"
    newlines = "keep"
    positions = "compact"
    needs_projector = True

    keep: float | int = 0.1112
    directions: int = 64
    step: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("directions", self.directions)
        check_number("step", self.step, 0, above=True)
        check_count("seed", self.seed, least=0)

    def select(self, ctx: VisualContext, budget: Tensor) -> Tensor:
        """Slots (I, K) of each view's most sensitive, most diverse tokens."""
        views = Views.of(ctx)
        weights = self._weights(views.take(self._sensitivity(ctx)), views.valid)
        return views.pick(sads(views.take(ctx.features), weights, views.share(budget, equal=True), views.valid))

    def _sensitivity(self, ctx: VisualContext) -> Tensor:
        if ctx.projector is None or ctx.projector_input is None:
            raise ValueError(f"Reducer {self.name!r} perturbs the projector's input, which this model does not show.")
        x = ctx.projector_input[ctx.candidates].float()
        generator = torch.Generator().manual_seed(self.seed)
        directions = torch.randn(self.directions, x.shape[1], generator=generator, dtype=x.dtype, device="cpu")
        found = sensitivity(x, in_float32(ctx.projector), directions.to(x.device), self.step)
        out = torch.zeros_like(ctx.candidates, dtype=x.dtype)
        return out.masked_scatter(ctx.candidates, found)

    @staticmethod
    def _weights(values: Tensor, valid: Tensor) -> Tensor:
        weights = scaled(values, valid, floor=1e-8)
        return torch.where((weights > 0).any(1, keepdim=True), weights, 1.0)


def in_float32(projector: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The projector with its parameters in float32, without a copy of the module."""
    if not isinstance(projector, nn.Module):
        return projector
    named = [*projector.named_parameters(), *projector.named_buffers()]
    state = {name: value.float() if value.is_floating_point() else value for name, value in named}
    return lambda x: functional_call(projector, state, (x,))


@torch.no_grad()
def sensitivity(x: Tensor, projector: Callable[[Tensor], Tensor], directions: Tensor, step: float) -> Tensor:
    """Mean over directions of ``|M(x + h u) - M(x - h u)| / 2h``.

    Parameters
    ----------
    x : Tensor
        (T, C).
    projector : callable
        (T', C) to (T', D), token by token.
    directions : Tensor
        (m, C), normalised here.
    step : float
        h.

    Returns
    -------
    Tensor
        (T,) float32.

    Raises
    ------
    ValueError
        If the projector merges tokens.
    """
    directions = step * functional.normalize(directions.float(), dim=1, eps=1e-12)
    projected = projector(x)
    if len(projected) != len(x):
        raise ValueError(
            f"The projector turns {len(x)} inputs into {len(projected)} tokens: the sensitivity of a single token is "
            "not defined for a merging projector."
        )
    width = max(projected.shape[-1], x.shape[1])
    total = x.new_zeros(len(x))
    for part in directions.split(max(1, CHUNK // max(1, len(x) * width))):
        moved = torch.cat([x + part[:, None], x - part[:, None]]).flatten(0, 1)
        plus, minus = projector(moved).float().view(2, len(part), len(x), -1)
        total += (plus - minus).norm(dim=2).sum(0)
    return total / (2 * step * len(directions))
