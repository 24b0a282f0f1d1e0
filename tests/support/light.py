# SPDX-License-Identifier: Apache-2.0
"""An independent reference for light layers: the stock model on the full sequence, with plain hooks that undo work."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import tiny
import torch
from oracles import language_model, runs_of, visual_and_real
from torch import Tensor, nn

from vtoken.light import LightLayer
from vtoken.reducers.base import Reducer


@dataclass(frozen=True)
class Light(Reducer):
    """Given light layers, and no visual token from layer ``drop`` on."""

    name = "light"
    plan: tuple[tuple[int, LightLayer], ...] = ()
    drop: int | None = None

    def light_layers(self, depth):
        return dict(self.plan)

    def layers(self, depth):
        return () if self.drop is None else (self.drop,)

    def at_layer(self, layer, ctx):
        return ctx.cut(ctx.valid & False)


def anyres_cells(model: nn.Module, size: tuple[int, int]) -> Tensor:
    """(N, 3) crop, row and column of each token, NaN for newlines: numbers sent through the model's own packing."""
    views, _ = tiny.anyres_length(model, size)
    side = tiny.SIDE // tiny.PATCH
    cells = torch.cartesian_prod(torch.arange(views), torch.arange(side), torch.arange(side)).float()
    features = nn.functional.pad(cells, (0, tiny.WIDTH - 3)).view(views, side**2, tiny.WIDTH)
    newline = torch.full((tiny.WIDTH,), float("nan"))
    extra = {"vision_feature_select_strategy": "default"}
    packed, _ = model.model.pack_image_features([features], torch.tensor([size]), image_newline=newline, **extra)
    return packed[0][:, :3]


def grids(views: int, rows: int, columns: int) -> Tensor:
    return torch.cartesian_prod(*map(torch.arange, (views, rows, columns))).float()


def cells_of(family: str, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """(B, S, 3): number of the view in the batch, row and column of each visual token, NaN elsewhere."""
    visual, _ = visual_and_real(inputs)
    out = torch.full((*visual.shape, 3), float("nan"))
    number = 0
    for row, runs in enumerate(runs_of(visual)):
        for run in runs:
            if family == "llava_next":
                found = anyres_cells(model, tiny.ANYRES_SIZES[number])
            elif family.startswith("qwen"):
                _, height, width = tiny.QWEN_GRIDS[number]
                found = grids(1, height // 2, width // 2)
            elif family == "internvl":
                found = grids(tiny.TILES[number], 2, 2)
            else:
                side = round(len(run) ** 0.5)
                found = grids(1, side, side)
            found[:, 0] += 100 * number
            out[row, run] = found
            number += 1
    return out


@contextlib.contextmanager
def undoing(model: nn.Module, reducer: Light, inputs: dict[str, Tensor], cells: Tensor):
    """The stock model, in which hooks zero what light layers skip and an explicit mask hides what they do not see."""
    visual, _ = visual_and_real(inputs)
    plan, handles = reducer.light_layers(0), []

    def rows(x: Tensor) -> Tensor:
        return nn.functional.pad(visual, (0, x.shape[1] - visual.shape[1]))[..., None]

    def mask(number: int, light: LightLayer, args: tuple, kwargs: dict):
        hidden, base = args[0], kwargs.get("attention_mask")
        total = hidden.shape[1]
        base = torch.ones(total, total).tril()[None, None] == 1 if base is None else base
        allow = (base if base.dtype == torch.bool else base == 0).expand(len(hidden), -1, -1, -1).clone()
        if reducer.drop is not None and number >= reducer.drop:
            allow &= ~rows(hidden)[:, None, None, :, 0]
        if light.window is not None:
            far = (cells[:, :, None] - cells[:, None]).abs()  # not a number beside tokens that are in no grid
            far = (far[..., 0] > 0) | (far[..., 1] > light.window // 2) | (far[..., 2] > light.window // 2)
            length = cells.shape[1]
            allow[:, 0, :length, :length] &= ~far
        made = torch.zeros(allow.shape, dtype=hidden.dtype).masked_fill(~allow, torch.finfo(hidden.dtype).min)
        return args, {**kwargs, "attention_mask": made}

    for number, layer in enumerate(language_model(model).layers):
        light = plan.get(number, LightLayer())
        if light.window is not None or reducer.drop is not None:
            before = lambda _, args, kwargs, n=number, s=light: mask(n, s, args, kwargs)  # noqa: E731
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        if light.heads is not None:

            def silence(module, args, light=light):
                heads = args[0].unflatten(-1, (len(light.heads), -1))
                idle = ~torch.tensor(light.heads)[:, None]
                return (heads.masked_fill(rows(args[0])[..., None] & idle, 0.0).flatten(-2),)

            handles.append(layer.self_attn.o_proj.register_forward_pre_hook(silence))
        if not light.attention:
            zero = lambda _, __, output: output.masked_fill(rows(output), 0.0)  # noqa: E731
            handles.append(layer.self_attn.o_proj.register_forward_hook(zero))
        if light.ffn == 0:
            zero = lambda _, __, output: output.masked_fill(rows(output), 0.0)  # noqa: E731
            handles.append(layer.mlp.register_forward_hook(zero))
        elif light.ffn < 1:

            def thin(module, args, light=light):
                unused = torch.arange(args[0].shape[-1]) >= round(light.ffn * args[0].shape[-1])
                return (args[0].masked_fill(rows(args[0]) & unused, 0.0),)

            handles.append(layer.mlp.down_proj.register_forward_pre_hook(thin))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
