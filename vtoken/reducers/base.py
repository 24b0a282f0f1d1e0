# SPDX-License-Identifier: Apache-2.0
"""Bases of the reducers: a new method overrides one function of one of them.

A reducer is a frozen dataclass. Its fields are its hyper-parameters; its class attributes say what it is. It keeps
patches out of the vision tower (`Reducer.before_tower`), drops them inside of it (`Reducer.in_tower`, or
`Reducer.thin_tower` where they come back), changes the sequence before the language model (`Reducer.before_llm`) or at
decoder layers (`Reducer.at_layer`), makes decoder layers compute less for visual tokens (`Reducer.light_layers`), or
does several of these.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vtoken.budget import Keep, budget, check_keep, is_identity
from vtoken.context import Cut, ItemLayout, Thinned, TowerContext, VisualContext
from vtoken.encoder import EncoderRead
from vtoken.light import LightLayer
from vtoken.ops import merge_rows, row_sizes
from vtoken.ops.topk import best_k

HOOKS = {
    "before_tower": ("before_tower",),
    "in_tower": ("in_tower", "thin_tower"),
    "before_llm": ("before_llm",),
    "in_llm": ("at_layer",),
    "light": ("light_layers",),
}
"""Methods of a reducer by the stage at which they act."""


@dataclass(frozen=True)
class Reducer:
    """A visual-token reducer.

    Parameters
    ----------
    repair : bool
        Whether a kept token weighs as much in attention as the tokens that it stands for, see `vtoken.engine.repair`.
    """

    repair: bool = dataclasses.field(default=False, kw_only=True)

    name: ClassVar[str] = ""
    """Registered name; set by `vtoken.registry.register`."""
    summary: ClassVar[str] = ""
    """One line for ``vtoken list``."""
    paper: ClassVar[str] = ""
    """arXiv id, "" for a baseline."""
    newlines: ClassVar[str] = "drop"
    """``"keep"``: image_newline tokens always stay, on top of the budget; ``"drop"``: they go with the first cut."""
    positions: ClassVar[str] = "keep"
    """Position ids the authors use: ``"keep"`` the original ones, or ``"compact"``, renumbered."""
    uses_text: ClassVar[bool] = False
    """Whether the choice depends on the text, so that without a cache it may change as the answer grows."""
    needs_projector: ClassVar[bool] = False
    """Whether `VisualContext.projector_input` and `VisualContext.projector` are wanted."""

    def in_tower(self, ctx: TowerContext) -> Tensor:
        """Choose what stays from block `tower_block` of the vision tower on: (V, K) long, groups of each view."""
        raise NotImplementedError

    def before_tower(self, pixels: Tensor) -> Tensor:
        """Choose what enters the vision tower, from the pixels of one picture or clip.

        Parameters
        ----------
        pixels : Tensor
            (T, h, w, D): what becomes one token each, at T time steps, in [0, 1] up to a constant for each channel.

        Returns
        -------
        Tensor
            (T * h * w,) long, in raster order: the unit that stands for each one, itself where it enters the tower.
        """
        raise NotImplementedError

    @property
    def pixel_std(self) -> tuple[float, ...] | None:
        """``image_std`` of the processor, which scales the pixels that `before_tower` sees; None for the family's."""
        return None

    def thin_tower(self, states: Tensor, before: Tensor) -> Thinned:
        """Choose what stays from block `tower_block` of the vision tower on, to be rebuilt behind the last one.

        Parameters
        ----------
        states, before : Tensor
            (L, C): the patches of one picture, view or clip before that block, and before the one before it.
        """
        raise NotImplementedError

    def before_llm(self, ctx: VisualContext) -> Cut | None:
        """Choose the tokens that enter the language model; None leaves all."""
        return None

    def at_layer(self, layer: int, ctx: VisualContext) -> Cut | None:
        """Choose the tokens that stay from decoder layer ``layer`` on; None leaves all."""
        return None

    def tower_block(self) -> int | float:
        """The block of the tower before which `in_tower` or `thin_tower` acts, as `vtoken.EncoderRead` names it."""
        raise NotImplementedError

    def tower_whole(self) -> int | float:
        """Blocks from `tower_block` on in which all patches are attended to, rebuilt; or a share of the depth."""
        return 0

    def tower_reads(self) -> tuple[str, ...]:
        """Statistics, by the names of `vtoken.EncoderRead`, that `in_tower` wants of the block before."""
        return ()

    @property
    def cutter(self) -> Reducer | None:
        """The reducer that drops patches before or inside of the vision tower, None if none does."""
        return self if {"before_tower", "in_tower"} & {*self.stages} and not self.is_identity else None

    def picture_grid(self, layout: ItemLayout) -> tuple[int, int]:
        """Rows and columns of tokens at which a picture is encoded once more, smaller, for ``ctx.resampled``."""
        raise NotImplementedError

    @property
    def resampler(self) -> Reducer | None:
        """The reducer whose `picture_grid` is asked, None if pictures are encoded once."""
        return self if type(self).picture_grid is not Reducer.picture_grid and not self.is_identity else None

    def layers(self, depth: int) -> tuple[int, ...]:
        """Decoder layers, of ``depth``, before which `at_layer` is called; ``depth`` to look behind the last one."""
        return ()

    def taps(self, depth: int) -> dict[int, str]:
        """Decoder layers whose attention rows are recorded in ``ctx.attention``.

        The rows are ``"last"``, ``"text"``, ``"question"`` or ``"all"``, see `VisualContext.rows`.
        """
        return {}

    def peeks(self, depth: int) -> tuple[int, ...]:
        """Those of `layers` whose own attention, which is yet to come, `at_layer` asks for by ``ctx.peek``."""
        return ()

    def light_layers(self, depth: int) -> dict[int, LightLayer]:
        """Decoder layers, of ``depth``, in which visual rows compute less during prefill."""
        return {}

    def encoder_reads(self) -> tuple[EncoderRead, ...]:
        """Statistics of the vision tower that the reducer wants in ``ctx.encoder``."""
        return ()

    def files(self) -> tuple[Path, ...]:
        """Files whose content decides what the reducer does."""
        return ()

    @property
    def is_identity(self) -> bool:
        """Whether the reducer leaves the model alone."""
        return False

    @property
    def stages(self) -> tuple[str, ...]:
        """Where it acts: any of ``"before_tower"``, ``"in_tower"``, ``"before_llm"``, ``"in_llm"`` and ``"light"``."""
        return tuple(stage for stage, hooks in HOOKS.items() if any(self.overrides(hook) for hook in hooks))

    def overrides(self, hook: str) -> bool:
        """Whether the reducer has a method of that name of its own."""
        return getattr(type(self), hook) is not getattr(Reducer, hook)

    def config(self) -> dict[str, Any]:
        """Name and parameters: the mapping from which `vtoken.get_reducer` builds the same reducer."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        if not given["repair"]:  # an option of all reducers, and not of what they are
            del given["repair"]
        return {"reducer": self.name, **given}

    def __str__(self) -> str:
        """Name, budget, and what differs from the defaults."""
        given = [f for f in dataclasses.fields(self) if f.init]
        told = [f"{f.name}={v}" for f in given if (v := getattr(self, f.name)) != f.default or f.name == "keep"]
        return ",".join([self.name, *told])


@dataclass(frozen=True)
class KeepReducer(Reducer):
    """A reducer with a budget.

    Parameters
    ----------
    keep : float or int
        Ratio in (0, 1] of the visual tokens of each image, or tokens per image. 1.0 is the identity.
    """

    keep: Keep = 0.25

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", check_keep(self.keep))

    @property
    def is_identity(self) -> bool:
        return is_identity(self.keep)


@dataclass(frozen=True)
class SelectReducer(KeepReducer):
    """Keeps the tokens that `select` picks."""

    @abstractmethod
    def select(self, ctx: VisualContext, budget: Tensor) -> Tensor:
        """Pick ``budget`` (I,) of ``ctx.candidates`` (I, N).

        Returns
        -------
        Tensor
            (I, K) long slots in any order, padded with -1.
        """

    def before_llm(self, ctx: VisualContext) -> Cut | None:
        wanted = ctx.budget(self.keep)
        index = self.select(ctx, torch.minimum(wanted, ctx.candidates.sum(1)))
        return Cut(with_newlines(ctx.cut(index).keep, ctx, wanted))


@dataclass(frozen=True)
class ScoreReducer(SelectReducer):
    """Keeps the tokens with the highest score."""

    @abstractmethod
    def score(self, ctx: VisualContext) -> Tensor:
        """(I, N) float: higher is better; values outside of ``ctx.candidates`` do not matter."""

    def select(self, ctx: VisualContext, budget: Tensor) -> Tensor:
        return best_candidates(self.score(ctx), budget, ctx, self.name)


class Assignment(NamedTuple):
    """Which slot each token is merged into.

    Attributes
    ----------
    source : Tensor
        (I, N) long: a slot of the same item that is its own target; -1 for a token that is dropped.
    weights : Tensor or None
        (I, N): weight of each token in the mean; the patches behind it if None.
    """

    source: Tensor
    weights: Tensor | None = None


@dataclass(frozen=True)
class MergeReducer(KeepReducer):
    """Averages tokens into the slots that `assign` names."""

    @abstractmethod
    def assign(self, ctx: VisualContext, budget: Tensor) -> Assignment:
        """Say into which slot each candidate goes; ``budget`` (I,) slots of each item are their own target."""

    def merge(self, ctx: VisualContext, assignment: Assignment) -> Tensor:
        """Features (I, N, D) of the merged tokens: a weighted mean."""
        weights = ctx.sizes if assignment.weights is None else assignment.weights
        return merge_rows(ctx.features, assignment.source, ctx.longest, weights)

    def before_llm(self, ctx: VisualContext) -> Cut | None:
        wanted = ctx.budget(self.keep)
        source, weights = self.assign(ctx, torch.minimum(wanted, ctx.candidates.sum(1)))
        slots = torch.arange(ctx.longest, device=source.device)
        keep = with_newlines(source == slots, ctx, wanted)
        source = torch.where(keep, slots, source)
        features = check_features(self.merge(ctx, Assignment(source, weights)), keep, self.name)
        sizes = row_sizes(source, ctx.longest, ctx.sizes)
        return Cut(keep, features.to(ctx.hidden.dtype), sizes, source)


@dataclass(frozen=True)
class LayerReducer(KeepReducer):
    """Keeps the highest-scored tokens at one or more decoder layers.

    Of n layers, the i-th leaves ``(K / N) ** (i / n)`` of the N original tokens, so that the last one leaves K.
    """

    @abstractmethod
    def score(self, layer: int, ctx: VisualContext) -> Tensor:
        """(I, N) float: higher is better; values outside of ``ctx.candidates`` do not matter."""

    def at_layer(self, layer: int, ctx: VisualContext) -> Cut | None:
        layers = self.layers(ctx.depth)
        wanted = stage_budget(ctx, self.keep, layers.index(layer) + 1, len(layers))
        index = best_candidates(self.score(layer, ctx), wanted, ctx, self.name)
        return Cut(with_newlines(ctx.cut(index).keep, ctx, wanted))


def stage_budget(ctx: VisualContext, keep: Keep, stage: int, stages: int) -> Tensor:
    """(I,) long: tokens of each item after ``stage`` of ``stages`` cuts that shrink it by the same factor."""
    tokens = ctx.counted.double()
    share: Any = budget(keep, ctx.counted) / tokens if isinstance(keep, int) else keep
    return ctx.to_choose((tokens * share ** (stage / stages)).round().long().clamp(min=1))


def with_newlines(keep: Tensor, ctx: VisualContext, wanted: Tensor) -> Tensor:
    """Add newlines to (I, N) bool: all of them, or as many as a budget (I,) beyond the patches has room for."""
    if not ctx.has_newlines:
        return keep
    newline = ctx.newline & ctx.valid
    if ctx.held is not None:  # stays anyway, and is counted already
        newline = newline & ~ctx.held
    if ctx.newlines == "keep":
        return keep | newline
    return keep | (newline & (newline.cumsum(1) <= (wanted - keep.sum(1))[:, None]))


def best_candidates(scores: Tensor, wanted: Tensor, ctx: VisualContext, name: str) -> Tensor:
    """(I, K) long: the candidates with the highest scores (I, N), up to ``wanted`` (I,), padded with -1."""
    count = torch.minimum(wanted, ctx.candidates.sum(1))
    return best_k(check_scores(scores, ctx, name), count, ctx.candidates)


def check_scores(scores: Tensor, ctx: VisualContext, name: str) -> Tensor:
    """Scores as float32, 0 outside of the candidates; or a sentence if a candidate has none.

    Raises
    ------
    ValueError
        If a score of a candidate is not finite.
    """
    bad = ctx.candidates & ~scores.isfinite()
    if bool(bad.any()):
        item, slot = bad.nonzero()[0].tolist()
        raise ValueError(
            f"Reducer {name!r} found the score {scores[item, slot].item()} at token {slot} of image {item}: "
            "the model's features are not finite there; check its dtype (float16 overflows) and its inputs."
        )
    return scores.float().masked_fill(~ctx.candidates, 0.0)


def check_features(features: Tensor, keep: Tensor, name: str) -> Tensor:
    """Features (I, N, D) as they are, or a sentence if a kept token has a value that is not finite.

    Raises
    ------
    ValueError
        If a feature of a token in ``keep`` (I, N) is not finite.
    """
    bad = keep & ~features.isfinite().all(2)
    if bool(bad.any()):
        item, slot = bad.nonzero()[0].tolist()
        raise ValueError(
            f"Reducer {name!r} found features that are not finite at token {slot} of image {item}: check the model's "
            "dtype (float16 overflows) and its inputs."
        )
    return features
