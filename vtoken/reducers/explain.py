# SPDX-License-Identifier: Apache-2.0
"""Tokens by relevance, which a small trained network reads off the first decoder layer's attention."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from vtoken import checkpoints
from vtoken.context import VisualContext
from vtoken.reducers.base import LayerReducer
from vtoken.reducers.rows import mean_over_rows
from vtoken.reducers.views import Views, grid
from vtoken.registry import register

LEAST = 1e-4  # of attention relative to its mean


@register("explain")
@dataclass(frozen=True)
class Explain(LayerReducer):
    """Explainability-based token compression (arXiv 2506.01097): keep what the answer will rest on.

    A convolutional network, trained once for each model, predicts relevance from the first decoder layer's attention;
    the most relevant tokens are kept before that layer does its work. The paper's network and its inputs are not
    published in detail. Here it sees, per head, the attention of the question (mean over its tokens) and of its last
    token to every visual token, on the grid of each view, and is trained on `vtoken.explain.relevance` by ``vtoken
    train-scorer``. No number of the paper applies.

    Parameters
    ----------
    checkpoint : str or None
        The trained network: a ``.safetensors`` file, a PyTorch file of tensors, or an embedded model's name. None
        ranks by the untrained input, the question's mean attention: a baseline, not the method.

    Raises
    ------
    ValueError
        If ``keep`` is out of range, or the checkpoint is missing, damaged or does not fit the model.
    """

    summary = "Relevance predicted from the first decoder layer's attention."
    paper = "2506.01097"
    uses_text = True

    checkpoint: str | None = None

    def files(self) -> tuple[Path, ...]:
        return (checkpoints.path_of(self.checkpoint, "scorer"),) if self.checkpoint else ()

    def layers(self, depth: int) -> tuple[int, ...]:
        return (0,)

    def peeks(self, depth: int) -> tuple[int, ...]:
        return self.layers(depth)

    def score(self, layer: int, ctx: VisualContext) -> Tensor:
        """(I, N): log relevance, or the mean attention."""
        assert ctx.peek is not None
        if self.checkpoint is None:
            return ctx.per_item(mean_over_rows(ctx.peek("question"))[..., None])[..., 0]
        return predict(first_layer_maps(ctx), ctx, load_scorer(self.checkpoint))


def first_layer_maps(ctx: VisualContext) -> Tensor:
    """(I, N, 2 H): log attention that each head of the coming layer pays to visual tokens, relative to its mean.

    The first H channels are the mean over the question's tokens, the others the last one.
    """
    assert ctx.peek is not None
    found = ctx.peek("question")
    rows, weight = found.probabilities.float(), found.valid.float()[:, None, :, None]
    mean = (rows * weight).sum(2) / weight.sum(2).clamp(min=1)
    maps = ctx.per_item(torch.cat([mean, rows[:, :, -1]], 1).mT)
    there = ctx.candidates[..., None]
    average = (maps * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
    return (maps / average.clamp(min=torch.finfo(maps.dtype).tiny)).clamp(min=LEAST).log() * there


def predict(maps: Tensor, ctx: VisualContext, weights: dict[str, Tensor]) -> Tensor:
    """Scores (I, N) of maps (I, N, 2 H): convolutions over the grid of each view, GELU between them.

    Parameters
    ----------
    weights : dict
        ``{n}.weight`` (out, in, k, k) with odd k and ``{n}.bias`` (out,), in the order of n.

    Raises
    ------
    ValueError
        If the network was trained for another number of heads.
    """
    layers = sorted((name for name in weights if name.endswith(".weight")), key=lambda name: int(name.split(".")[0]))
    if weights[layers[0]].shape[1] != maps.shape[2]:
        raise ValueError(
            f"The scorer reads {weights[layers[0]].shape[1]} attention maps, but this model has {maps.shape[2]}: it "
            "was trained for another model."
        )
    views = Views.of(ctx)
    row, column = (views.take(x) for x in grid(ctx))
    height, width = int(row.max()) + 1, int(column.max()) + 1
    cell = torch.where(views.valid, row * width + column, height * width)
    picture = maps.new_zeros(len(cell), height * width + 1, maps.shape[2])
    picture = picture.scatter(1, cell[..., None].expand(-1, -1, maps.shape[2]), views.take(maps))[:, :-1]
    there = maps.new_zeros(len(cell), height * width + 1).scatter(1, cell, 1.0)[:, None, :-1]
    x, there = (part.unflatten(2, (height, width)) for part in (picture.mT, there))
    for number, name in enumerate(layers):
        kernel, bias = (weights[key].to(x) for key in (name, name.replace("weight", "bias")))
        x = functional.conv2d(functional.gelu(x) if number else x, kernel, bias, padding="same") * there
    found = functional.pad(x.flatten(1), (0, 1)).gather(1, cell)  # only the last layer's channel is left
    return views.spread(found, maps.new_zeros(maps.shape[:2]))


def load_scorer(source: str) -> dict[str, Tensor]:
    """Read the network's weights.

    Raises
    ------
    ValueError
        If there is no such file, or it holds no such network.
    """
    found = checkpoints.load(source, "scorer").tensors
    kernels = {name: value for name, value in found.items() if name.endswith(".weight")}
    fits = all(
        name.split(".")[0].isdigit()
        and value.dim() == 4
        and value.shape[2] == value.shape[3]
        and value.shape[2] % 2 == 1
        and name.replace("weight", "bias") in found
        for name, value in kernels.items()
    )
    if not kernels or not fits:
        raise ValueError(f"{source!r} holds no scorer: it needs convolutions named '<n>.weight' and '<n>.bias'.")
    return found
