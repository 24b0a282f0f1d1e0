# SPDX-License-Identifier: Apache-2.0
"""Reducers one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vtoken.context import Cut, VisualContext
from vtoken.encoder import EncoderRead
from vtoken.light import LightLayer
from vtoken.reducers.base import HOOKS, KeepReducer, Reducer

IN_THE_TOWER = {"before_tower", "in_tower"}
"""Stages that only the first reducer of a chain can have."""


@dataclass(frozen=True)
class Chain(Reducer):
    """Apply reducers in order; each one sees what those before it kept.

    Stages before the language model come first, each works on the tokens and features the former one left. Stages
    inside it act at their layers, in order where they share one. A stage may do both. Every ``keep`` is a share of the
    *original* tokens of an image, so ``Chain([IDPruner(keep=0.5), FastV(keep=0.25)])`` ends with a quarter of them. A
    stage before or inside the vision tower comes first; what it drops is no candidate of later ones.

    Parameters
    ----------
    reducers : sequence of Reducer
        At least one.
    repair : bool
        As that of any reducer; so does a chain one of whose stages repairs.

    Raises
    ------
    ValueError
        If a stage is no reducer, a stage before or inside the vision tower is not the first, a stage before the
        language model comes after one inside it, a later ``keep`` is no smaller than an earlier one before the
        language model, or two stages need different attention rows of a layer.
    """

    name = "chain"
    summary = "Several reducers, one after the other."

    reducers: Sequence[Reducer] = ()

    def __post_init__(self) -> None:
        if isinstance(self.reducers, Reducer) or not isinstance(self.reducers, Iterable):
            raise ValueError(f"Chain({self.reducers!r}) is no list: write Chain([first, second]).")
        stages = tuple(self.reducers)
        object.__setattr__(self, "reducers", stages)
        if not stages:
            raise ValueError("A chain needs at least one stage: write Chain([IDPruner(keep=0.5), ToDRE(keep=0.25)]).")
        for stage in stages:
            if not isinstance(stage, Reducer):
                raise ValueError(f"Chain stage {stage!r} is no reducer: build it first, get_reducer({stage!r}).")
        self._check_order()
        before = [stage for stage in stages if "before_llm" in stage.stages] or list(stages)
        self._set("repair", self.repair or any(stage.repair for stage in stages))
        self._set("newlines", "keep" if all(stage.newlines == "keep" for stage in before) else "drop")
        self._set("positions", "compact" if all(stage.positions == "compact" for stage in stages) else "keep")
        self._set("uses_text", any(stage.uses_text for stage in stages))
        self._set("needs_projector", any(stage.needs_projector for stage in stages))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_order(self) -> None:
        inside: Reducer | None = None
        last: KeepReducer | None = None
        for number, stage in enumerate(self.reducers):
            if IN_THE_TOWER & {*stage.stages} and number:
                where = "inside" if "in_tower" in stage.stages else "before"
                raise ValueError(
                    f"Chain: {stage.name!r} acts {where} the vision tower, which only the first stage of a chain can: "
                    f"put it first, and no other such stage."
                )
            if stage.resampler is not None and number:
                raise ValueError(
                    f"Chain: {stage.name!r} encodes the picture anew, which no stage can have shortened before: put it "
                    "first."
                )
            if not {*IN_THE_TOWER, "before_llm"} & {*stage.stages}:
                inside = inside or (stage if "in_llm" in stage.stages else None)
                continue
            if inside is not None:
                raise ValueError(
                    f"Chain: {stage.name!r} acts before the language model and cannot follow {inside.name!r}, which "
                    f"acts inside it: put {stage.name!r} first."
                )
            if isinstance(stage, KeepReducer):
                if (
                    last is not None
                    and type(stage.keep) is type(last.keep)
                    and stage.keep >= last.keep
                    and not self._counts_patches(last)
                ):
                    raise ValueError(
                        f"Chain: {stage.name!r} with keep={stage.keep} does nothing after {last.name!r} with "
                        f"keep={last.keep}: keep counts an image's original tokens, so give a smaller one."
                    )
                last = stage

    @staticmethod
    def _counts_patches(stage: KeepReducer) -> bool:
        """Whether ``keep`` is a number that says nothing about the tokens of an image."""
        return isinstance(stage.keep, int) and "in_tower" in stage.stages

    @property
    def stages(self) -> tuple[str, ...]:
        found = {name for stage in self.reducers for name in stage.stages}
        return tuple(name for name in HOOKS if name in found)

    @property
    def is_identity(self) -> bool:
        return all(stage.is_identity for stage in self.reducers)

    @property
    def _active(self) -> tuple[Reducer, ...]:
        return tuple(stage for stage in self.reducers if not stage.is_identity)

    @property
    def cutter(self) -> Reducer | None:
        return next((stage.cutter for stage in self._active if stage.cutter is not None), None)

    @property
    def resampler(self) -> Reducer | None:
        return next((stage.resampler for stage in self._active if stage.resampler is not None), None)

    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(path for stage in self.reducers for path in stage.files()))

    def encoder_reads(self) -> tuple[EncoderRead, ...]:
        return tuple(dict.fromkeys(read for stage in self._active for read in stage.encoder_reads()))

    def layers(self, depth: int) -> tuple[int, ...]:
        return tuple(sorted({layer for stage in self._active for layer in stage.layers(depth)}))

    def peeks(self, depth: int) -> tuple[int, ...]:
        return tuple(sorted({layer for stage in self._active for layer in stage.peeks(depth)}))

    def taps(self, depth: int) -> dict[int, str]:
        rows: dict[int, str] = {}
        owner: dict[int, str] = {}
        for stage in self._active:
            for layer, wanted in stage.taps(depth).items():
                if rows.setdefault(layer, wanted) != wanted:
                    raise ValueError(
                        f"Chain: {owner[layer]!r} reads the {rows[layer]!r} attention rows of layer {layer} and "
                        f"{stage.name!r} the {wanted!r} rows: move one of them to another layer."
                    )
                owner.setdefault(layer, stage.name)
        return rows

    def light_layers(self, depth: int) -> dict[int, LightLayer]:
        """In a layer that several stages make light, visual rows skip what any of them skips."""
        light: dict[int, LightLayer] = {}
        for stage in self._active:
            for layer, found in stage.light_layers(depth).items():
                light[layer] = light[layer] & found if layer in light else found
        return light

    def before_llm(self, ctx: VisualContext) -> Cut | None:
        """One cut with the effect of all stages before the language model."""
        return _compose(ctx, [stage.before_llm for stage in self._active])

    def at_layer(self, layer: int, ctx: VisualContext) -> Cut | None:
        """One cut with the effect of all stages that act at ``layer``."""
        acting = [stage for stage in self._active if layer in stage.layers(ctx.depth)]
        return _compose(ctx, [lambda ctx, stage=stage: stage.at_layer(layer, ctx) for stage in acting])

    def config(self) -> dict[str, Any]:
        more = {"repair": True} if self.repair else {}
        return {"reducer": self.name, "stages": [stage.config() for stage in self.reducers], **more}

    def __str__(self) -> str:
        repair = self.repair and not any(stage.repair for stage in self.reducers)
        return " > ".join(str(stage) for stage in self.reducers) + (",repair=True" if repair else "")


def _compose(ctx: VisualContext, steps: Sequence[Any]) -> Cut | None:
    total: Cut | None = None
    for step in steps:
        cut = step(ctx)
        if cut is None:
            continue
        ctx = ctx.after(cut)
        if total is not None:
            features = ctx.features if cut.features is not None or total.features is not None else None
            sizes = cut.sizes if cut.sizes is not None else total.sizes
            cut = Cut(total.keep & cut.keep, features, sizes, _follow(total, cut))
        total = cut
    return total


def _follow(first: Cut, second: Cut) -> torch.Tensor | None:
    """Slots that tokens end up in after two merges; None if neither merged."""
    if first.source is None and second.source is None:
        return None
    slots = torch.arange(first.keep.shape[1], device=first.keep.device).expand(first.keep.shape)
    one, two = (torch.where(cut.keep, slots, -1) if cut.source is None else cut.source for cut in (first, second))
    return torch.where(one < 0, -1, two.gather(1, one.clamp(min=0)))
