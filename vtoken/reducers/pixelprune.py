# SPDX-License-Identifier: Apache-2.0
"""PixelPrune: patches that their neighbours predict never enter the vision tower."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtoken.budget import Keep, budget, check_keep, is_identity
from vtoken.ops import top_k
from vtoken.precision import selection
from vtoken.reducers.base import Reducer
from vtoken.reducers.checks import check_choice, check_flag, check_number
from vtoken.registry import register

METRICS = ("max", "mae", "rmse")


@register("pixelprune")
@dataclass(frozen=True)
class PixelPrune(Reducer):
    """Drop the patches that a neighbour predicts, before the vision tower (PixelPrune, arXiv 2604.00886).

    A unit is what becomes one token, 2 x 2 patches, and it is predicted by the unit to its left, or by the one above
    it where the picture did not change from the unit above left to the one at the left but did to the one above. A
    unit within ``tau`` of its prediction is dropped: rows of pixels, rotary tables, windows and the lengths of packed
    attention are shortened, and M-RoPE positions are those of the full grid. So the whole tower, the projector and the
    language model compute fewer rows. At ``tau=0`` no pixel is lost, as a dropped unit equals its prediction.

    How much stays is up to the picture: half of a page of text, all of a photograph, which costs the look at the
    pixels only. Each time step of a clip is a picture of its own. It serves Qwen2-VL, Qwen2.5-VL, Qwen3-VL and
    Qwen3.5; other towers get pictures of one size in one tensor, from which no rows can be left out.

    Parameters
    ----------
    tau : float
        Largest distance, of pixels in [0, 1], at which a unit counts as predicted.
    metric : {"max", "mae", "rmse"}
        Distance of two units: largest, mean absolute or root mean square difference of a pixel's channel.
    anchored : bool
        Compare with what is left of the picture instead of with its pixels, so that no dropped unit is further than
        ``tau`` from the kept one that stands for it. At ``tau=0`` it is the same.
    keep : float or int, optional
        An exact budget instead of a threshold: the share of the units of each picture (or how many) that stay, those
        with the largest distance from their prediction. ``tau`` then only chooses between left and above. The authors
        have no such mode. 1.0 is the identity.
    std : tuple of float, optional
        ``image_std`` of the processor, a number for each channel, which undoes its normalisation. That of the family's
        released processors if not given; it does not matter at ``tau=0``.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """

    summary = "Drops patches that their neighbours predict, before the vision tower."
    paper = "2604.00886"

    tau: float = 0.0
    metric: str = "max"
    anchored: bool = True
    keep: Keep | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_number("tau", self.tau, 0, 1)
        check_choice("metric", self.metric, METRICS)
        check_flag("anchored", self.anchored)
        if self.keep is not None:
            object.__setattr__(self, "keep", check_keep(self.keep))
        if self.std is not None:
            object.__setattr__(self, "std", _numbers(self.std))

    @property
    def is_identity(self) -> bool:
        return self.keep is not None and is_identity(self.keep)

    @property
    def pixel_std(self) -> tuple[float, ...] | None:
        return self.std

    def before_tower(self, pixels: Tensor) -> Tensor:
        """(T * h * w,) long: the unit that stands for each one."""
        if not bool(pixels.isfinite().all()):
            raise ValueError(
                f"Reducer {self.name!r} found pixels that are not finite: check the processor and its inputs."
            )
        if self.keep is None:
            return predicted(pixels, self.tau, self.metric, self.anchored)
        return most_surprising(pixels, self.keep, self.tau, self.metric)


def _numbers(std: object) -> tuple[float, ...]:
    found = tuple(std) if isinstance(std, (tuple, list)) else ()
    if not found or not all(isinstance(x, (int, float)) and not isinstance(x, bool) and x > 0 for x in found):
        raise ValueError(f"std={std!r}: give image_std of the processor, a number above 0 for each channel.")
    return tuple(float(x) for x in found)


@selection
def predicted(pixels: Tensor, tau: float = 0.0, metric: str = "max", anchored: bool = True) -> Tensor:
    """Which unit stands for each one: itself if it is kept, else the kept one that predicts it.

    Parameters
    ----------
    pixels : Tensor
        (T, h, w, D): units of T pictures, in [0, 1] up to a constant.
    tau, metric, anchored
        See `PixelPrune`.

    Returns
    -------
    Tensor
        (T * h * w,) long, in raster order.
    """
    pixels = pixels.float()
    if anchored and tau > 0:
        return _against_what_is_left(pixels, tau, metric)
    parent, error = _parents(pixels, tau, metric)
    return _roots(torch.where(error > tau, _own(pixels), parent).flatten())


@selection
def most_surprising(pixels: Tensor, keep: Keep, tau: float = 0.0, metric: str = "max") -> Tensor:
    """`predicted` for a budget: the units with the largest error stay, the first one of the first picture always."""
    parent, error = _parents(pixels.float(), tau, metric)
    units = error.numel()
    error = error.flatten().clamp(max=torch.finfo(torch.float32).max)  # the first units have no prediction
    count = budget(keep, torch.tensor([units], device=error.device))
    kept = torch.zeros(units, dtype=torch.bool, device=error.device)
    kept[top_k(error[None], count)[0]] = True
    return _roots(torch.where(kept, _own(pixels).flatten(), parent.flatten()))


def _own(pixels: Tensor) -> Tensor:
    return torch.arange(pixels.shape[:3].numel(), device=pixels.device).view(pixels.shape[:3])


def _distance(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """(...) distances of units (..., D)."""
    gap = (a - b).abs()
    if metric == "max":
        return gap.amax(-1)
    return gap.mean(-1) if metric == "mae" else gap.square().mean(-1).sqrt()


def _parents(pixels: Tensor, tau: float, metric: str) -> tuple[Tensor, Tensor]:
    """(T, h, w) each: the neighbour that predicts a unit, and its distance; infinity for the first of a picture.

    The first unit of a later picture has that of the one before it for a neighbour, which only a budget may use.
    """
    own, (_, rows, columns) = _own(pixels), pixels.shape[:3]
    left, above = (torch.full(own.shape, torch.inf, device=pixels.device) for _ in range(2))
    left[:, :, 1:] = _distance(pixels[:, :, 1:], pixels[:, :, :-1], metric)
    above[:, 1:] = _distance(pixels[:, 1:], pixels[:, :-1], metric)
    down = torch.zeros_like(own, dtype=torch.bool)
    down[:, 1:, 0] = True
    # from above left to the left nothing changed, from above left to above something did
    down[:, 1:, 1:] = (above[:, 1:, :-1] <= tau) & (left[:, :-1, 1:] > tau)
    parent = torch.where(down, own - columns, own - 1)
    parent[:, 0, 0] = own[:, 0, 0] - rows * columns
    return parent.clamp(min=0), torch.where(down, above, left)


def _roots(parent: Tensor) -> Tensor:
    """Follow (N,) long to the units that are their own."""
    while not torch.equal(further := parent[parent], parent):
        parent = further
    return parent


def _against_what_is_left(pixels: Tensor, tau: float, metric: str) -> Tensor:
    """`predicted` where a dropped unit is worth its prediction: diagonal by diagonal, as each needs the one before."""
    _, rows, columns, _ = pixels.shape
    flat, own = pixels.flatten(0, 2), _own(pixels)
    source = own.clone()

    def near(a: Tensor, b: Tensor) -> Tensor:
        return _distance(flat[a], flat[b], metric) <= tau

    for diagonal in range(1, rows + columns - 1):
        row = torch.arange(max(0, diagonal - columns + 1), min(diagonal, rows - 1) + 1, device=pixels.device)
        column = diagonal - row
        left, above = source[:, row, (column - 1).clamp(min=0)], source[:, (row - 1).clamp(min=0), column]
        corner = source[:, (row - 1).clamp(min=0), (column - 1).clamp(min=0)]
        down = near(corner, left) & ~near(corner, above)
        down = torch.where((row == 0) | (column == 0), row > 0, down)
        guess = torch.where(down, above, left)
        here = own[:, row, column]
        source[:, row, column] = torch.where(near(here, guess), guess, here)
    return source.flatten()
