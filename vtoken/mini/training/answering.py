# SPDX-License-Identifier: Apache-2.0
"""One forward pass over packed questions: answers, and losses that say where to look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from vtoken.engine.reading import attention_rows
from vtoken.engine.taps import tap
from vtoken.mini.model import WIDTH
from vtoken.mini.training.batches import Pack, attention_mask
from vtoken.mini.training.supervision import PLACE_FIELDS, Heads

PLACE_LAYER, GROUND_LAYER, GROUND_HEADS, RELATE_LAYER, WRITE_HEADS, GROUND_WEIGHT = 1, 2, 2, 4, 2, 0.1


@dataclass(frozen=True)
class Prompt:
    """What stands before the questions of every document of a batch.

    ids (P,) with placeholders at the N columns ``slots``; positions (D, P), with D = 3 for M-RoPE, else 1; the
    questions begin at position ``start``.
    """

    ids: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    start: int


@dataclass
class Answers:
    """Logits and targets of the answer tokens, and the grounding loss."""

    logits: torch.Tensor
    target: torch.Tensor
    grounding: torch.Tensor

    @property
    def loss(self) -> torch.Tensor:
        """Cross-entropy of the answers plus the weighted grounding loss."""
        return F.cross_entropy(self.logits, self.target) + GROUND_WEIGHT * self.grounding

    @property
    def correct(self) -> torch.Tensor:
        """(M,) bool."""
        return self.logits.argmax(-1) == self.target


class Pointing:
    """Losses that say where to look: without them, binding a colour and a shape to one place is a plateau of thousands
    of steps, and comparing two places another one.

    Two heads of one layer look from a noun at the tokens that show it, and the noun's state after that layer tells
    what and where it is; two heads of a later layer look from the token that answers a comparison at its two nouns, the
    two others from where something is written down at the tokens that show it.

    Parameters
    ----------
    asked : Pack
        The questions.
    regions : Tensor
        (B, R, P) bool: which columns of the prefix show each noun.
    sources : Tensor
        (B, W, P) bool: which columns of the prefix show what is written.
    """

    def __init__(self, asked: Pack, regions: torch.Tensor, sources: torch.Tensor) -> None:
        self.asked, self.regions, self.sources, self.text = asked, regions, sources, regions.shape[-1]
        self.losses: list[torch.Tensor] = []

    def ground(self, module, query, key, mask, kwargs) -> None:
        """Tap of layer `GROUND_LAYER`."""
        rows = self.asked.nouns.clamp(min=0) + self.text
        seen = attention_rows(module, query, key, mask, kwargs, rows)[:, :GROUND_HEADS]
        mass = (seen[..., : self.text] * self.regions[:, None]).sum(-1)
        shown = (self.asked.nouns >= 0) & self.regions.any(-1)
        self.losses.append(-((mass + 1e-4).log().mean(1) * shown).sum() / shown.sum().clamp(min=1))

    def relate(self, module, query, key, mask, kwargs) -> None:
        """Tap of layer `RELATE_LAYER`."""
        self.write(module, query, key, mask, kwargs)
        first, second, answering = (self.asked.pairs.clamp(min=0) + self.text).unbind(-1)
        seen = attention_rows(module, query, key, mask, kwargs, answering)
        mass = torch.cat([seen[:, h].gather(-1, at[..., None]) for h, at in enumerate((first, second))], -1)
        pairs = self.asked.pairs[..., 0] >= 0
        self.losses.append(-((mass + 1e-4).log().sum(-1) * pairs).sum() / pairs.sum().clamp(min=1))

    def write(self, module, query, key, mask, kwargs) -> None:
        """Part of `relate`."""
        rows = self.asked.writing.clamp(min=0) + self.text
        seen = attention_rows(module, query, key, mask, kwargs, rows)[:, WRITE_HEADS:]
        mass = (seen[..., : self.text] * self.sources[:, None]).sum(-1)
        shown = (self.asked.writing >= 0) & self.sources.any(-1)
        self.losses.append(-((mass + 1e-4).log().mean(1) * shown).sum() / shown.sum().clamp(min=1))

    def name(self, heads: Heads, labels: dict[str, torch.Tensor], states: torch.Tensor) -> None:
        """Read the nouns' states after layer `GROUND_LAYER`."""
        rows = (self.asked.nouns.clamp(min=0) + self.text)[..., None].expand(-1, -1, WIDTH)
        self.losses.append(heads.noun_loss(states.gather(1, rows), labels, self.asked))


def kept_columns(prompt: Prompt, where: torch.Tensor) -> torch.Tensor:
    """(B, P') columns of the prompt without the visual tokens that are not among ``where`` (B, n)."""
    kept = torch.ones(len(where), len(prompt.ids), dtype=torch.bool)
    kept[:, prompt.slots] = torch.zeros(len(where), len(prompt.slots), dtype=torch.bool).scatter(1, where, True)
    return kept.nonzero()[:, 1].view(len(where), -1)


def prefix_of(model: Any, visual: torch.Tensor, prompt: Prompt, columns: torch.Tensor) -> torch.Tensor:
    """(B, P', WIDTH) embeddings of those columns of the prompt."""
    words = model.get_input_embeddings()(prompt.ids).expand(len(visual), -1, -1)
    return words.index_copy(1, prompt.slots, visual).gather(1, columns[..., None].expand(-1, -1, WIDTH))


def rotary(positions: torch.Tensor) -> torch.Tensor:
    """Position ids (D, B, P') as the decoder takes them: three of them for M-RoPE, else (B, P')."""
    return positions if len(positions) > 1 else positions[0]


def places_of(labels: dict[str, torch.Tensor], where: torch.Tensor) -> dict[str, torch.Tensor]:
    """Field -> (B, n) where the visual tokens ``where`` (B, n) are, in the order of the prompt."""
    return {name: labels[name].gather(1, where.sort(1).values) for name in PLACE_FIELDS}


def _in_prefix(shown: torch.Tensor, prompt: Prompt, columns: torch.Tensor) -> torch.Tensor:
    """(B, R, N) visual tokens as (B, R, P') columns of the prefix."""
    whole = torch.zeros(*shown.shape[:2], len(prompt.ids), dtype=torch.bool)
    whole[..., prompt.slots] = shown
    return whole.gather(2, columns[:, None].expand(-1, shown.shape[1], -1))


def answer(
    model: Any,
    heads: Heads,
    visual: torch.Tensor,
    prompt: Prompt,
    asked: Pack,
    labels: dict[str, torch.Tensor],
    where: torch.Tensor | None = None,
) -> Answers:
    """Answer packed questions about documents with visual tokens (B, N, WIDTH), or those at ``where`` (B, n) only."""
    size, count = visual.shape[:2]
    if where is None:
        where = torch.arange(count).expand(size, -1)
    columns = kept_columns(prompt, where)
    embed = model.get_input_embeddings()
    prefix = prefix_of(model, visual, prompt, columns)
    pointing = Pointing(asked, *(_in_prefix(shown, prompt, columns) for shown in (asked.regions, asked.sources)))
    text = columns.shape[1]
    positions = torch.cat(
        [prompt.positions[:, columns], (asked.positions + prompt.start).expand(len(prompt.positions), -1, -1)], -1
    )
    layers = model.model.language_model.layers
    read = [layers[GROUND_LAYER].register_forward_hook(lambda m, a, out: pointing.name(heads, labels, out))]
    if heads.places_unseen:
        slots = torch.isin(columns, prompt.slots)
        shown = places_of(labels, where)
        hook = lambda m, a, out: pointing.losses.append(heads.place_loss(out[:, :text][slots], shown))  # noqa: E731
        read.append(layers[PLACE_LAYER].register_forward_hook(hook))
    ground = tap(layers[GROUND_LAYER].self_attn, pointing.ground)
    with ground, tap(layers[RELATE_LAYER].self_attn, pointing.relate):
        hidden = model.model.language_model(
            inputs_embeds=torch.cat([prefix, embed(asked.ids)], 1),
            attention_mask=attention_mask(text, asked.block),
            position_ids=rotary(positions),
            use_cache=False,
        ).last_hidden_state
    for handle in read:
        handle.remove()
    target = asked.labels[:, 1:]
    counted = target != -100
    return Answers(model.lm_head(hidden[:, text:-1][counted]), target[counted], torch.stack(pointing.losses).sum())
