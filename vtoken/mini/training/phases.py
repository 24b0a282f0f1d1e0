# SPDX-License-Identifier: Apache-2.0
"""The training phases, in the order in which `vtoken.mini.training` runs them."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from transformers import LlavaForConditionalGeneration

from vtoken.mini.questions import KINDS
from vtoken.mini.training.answering import answer, visual_states
from vtoken.mini.training.batches import PATCHES, pack, scene_batch, train_rng
from vtoken.mini.training.labels import IGNORE
from vtoken.mini.training.loop import Meter, Trainer, steps
from vtoken.mini.training.supervision import Heads, Symbols

log = logging.getLogger("vtoken.mini")

BATCH, QUESTIONS = 16, 10  # scenes a step, questions a scene
EASY_STEPS = 600  # with few shapes a scene: binding is found there first
HORIZON = 6000  # steps of the decoder's learning-rate schedule, of which each phase takes the beginning
HARD_KINDS = [*KINDS, "existence", "position", "relation", "count", "word"]  # asked twice as often
BINDING_KINDS = [*KINDS, *["left of"] * 4, "beside", "beside", "digit", "word", "count"]

Save = Callable[[], None]


def foreground_first(labels: dict[str, torch.Tensor], number: int) -> torch.Tensor:
    """(B, number) raster places: everything that is not background, filled up with random background."""
    order = torch.rand(labels["kind"].shape) + 10.0 * (labels["kind"] != 0)
    return order.topk(number, 1).indices.sort(1).values


def teach_decoder(
    model: LlavaForConditionalGeneration,
    symbols: Symbols,
    heads: Heads,
    limit: int,
    minutes: float,
    save: Save,
    binding: bool,
) -> None:
    """Phases 1 and 2: answer questions about symbolic pictures; the second asks what needs two things at one place."""
    rng = train_rng(5 if binding else 1)
    kinds, rate = (BINDING_KINDS, 1e-3) if binding else (list(KINDS), 1.5e-3)
    trainer = Trainer({model.model.language_model: rate, symbols: rate, heads.noun: rate}, HORIZON)
    meter = Meter()
    for step in steps(limit, minutes):
        simple = step < EASY_STEPS
        most = (4 if binding else 2) if simple else 6
        batch = scene_batch(BATCH, rng, pixels=False, most_shapes=most, confusable=binding and step % 4 != 3)
        asked = pack(batch.scenes, QUESTIONS, kinds, rng)
        where = foreground_first(batch.labels, 32 if simple else 56)
        visual = symbols({k: v.gather(1, where) for k, v in batch.labels.items()}, dropout=0.02)
        visual = visual + 0.03 * torch.randn_like(visual)
        found = answer(model, heads, visual, where, asked, batch.labels)
        trainer.step(step, found.loss)
        meter.add(found, asked)
        if step % 50 == 49:
            log.info("decoder %d %s", step + 1, meter.report())
        if step % 250 == 249:
            save()
    save()


def field_accuracy(heads: Heads, features: torch.Tensor, labels: dict[str, torch.Tensor]) -> str:
    """Share of the patches whose label the heads find, by field."""
    parts = []
    for name, head in heads.patch.items():
        known = labels[name] != IGNORE
        right = (head(features).argmax(-1) == labels[name])[known]
        parts.append(f"{name[:5]} {right.float().mean():.2f}")
    return " ".join(parts)


def teach_tower(model: LlavaForConditionalGeneration, heads: Heads, limit: int, minutes: float, save: Save) -> None:
    """Phase 3: dense patch labels and picture labels from pixels."""
    rng = train_rng(2)
    trainer = Trainer({model.model.vision_tower: 1.5e-3, heads: 1.5e-3}, limit)
    losses = []
    for step in steps(limit, minutes):
        batch = scene_batch(BATCH, rng, crowded=step % 4 != 3)
        states = visual_states(model, batch.pixels)
        loss = heads.dense_loss(states[0][:, 1:], batch.labels)
        loss = loss + 4 * heads.picture_loss([state[:, 0] for state in states], batch.picture)
        trainer.step(step, loss)
        losses.append(loss.item())
        if step % 50 == 49:
            with torch.no_grad():
                found = field_accuracy(heads, states[0][:, 1:], batch.labels)
            log.info("tower %d loss %.3f | %s", step + 1, sum(losses) / len(losses), found)
            losses.clear()
        if step % 500 == 499:
            save()
    save()


def align(model: LlavaForConditionalGeneration, symbols: Symbols, limit: int, minutes: float) -> None:
    """Phase 4: the projector turns the tower's features into the decoder's symbolic tokens; only it is trained."""
    rng = train_rng(3)
    projector = model.model.multi_modal_projector
    trainer = Trainer({projector: 2e-3}, limit, warmup=20)
    losses = []
    for step in steps(limit, minutes):
        batch = scene_batch(BATCH, rng, crowded=step % 2 == 0)
        with torch.no_grad():
            features = visual_states(model, batch.pixels)[0][:, 1:]
            wanted = symbols(batch.labels)
        weight = torch.where(batch.labels["kind"] > 0, 3.0, 1.0) * (batch.labels["kind"] != IGNORE)
        loss = ((projector(features) - wanted).square().mean(-1) * weight).sum() / weight.sum()
        trainer.step(step, loss)
        losses.append(loss.item() / wanted.var().item())
        if step % 50 == 49:
            log.info("align %d unexplained variance %.3f", step + 1, sum(losses) / len(losses))
            losses.clear()


def teach_all(model: LlavaForConditionalGeneration, heads: Heads, limit: int, minutes: float, save: Save) -> None:
    """Phase 5: the whole model answers questions about pictures; the dense losses keep the tower honest."""
    rng = train_rng(4)
    core = model.model
    rates = {core.language_model: 6e-4, core.multi_modal_projector: 6e-4, core.vision_tower: 2e-4, heads: 2e-4}
    trainer, meter = Trainer(rates, limit), Meter()
    everywhere = torch.arange(PATCHES).expand(BATCH, -1)
    others = []
    for step in steps(limit, minutes):
        batch = scene_batch(BATCH, rng)
        asked = pack(batch.scenes, QUESTIONS, HARD_KINDS, rng)
        states = visual_states(model, batch.pixels)
        visual = core.multi_modal_projector(states[0][:, 1:])
        found = answer(model, heads, visual, everywhere, asked, batch.labels)
        dense = heads.dense_loss(states[0][:, 1:], batch.labels)
        picture = heads.picture_loss([state[:, 0] for state in states], batch.picture)
        trainer.step(step, found.loss + 0.2 * dense + 0.5 * picture)
        meter.add(found, asked)
        others.append((dense.item(), picture.item()))
        if step % 50 == 49:
            dense_mean, picture_mean = (sum(x) / len(others) for x in zip(*others, strict=True))
            log.info("joint %d %s | dense %.2f cls %.3f", step + 1, meter.report(), dense_mean, picture_mean)
            others.clear()
        if step % 250 == 249:
            save()
    save()
