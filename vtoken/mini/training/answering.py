# SPDX-License-Identifier: Apache-2.0
"""One forward pass over packed questions: answers, and losses that say where to look."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from vtoken.attention import attention_rows, tap
from vtoken.mini.model import WIDTH
from vtoken.mini.training.batches import PREFIX, PREFIX_IDS, Pack, attention_mask
from vtoken.mini.training.supervision import Heads

GROUND_LAYER, GROUND_HEADS, RELATE_LAYER, GROUND_WEIGHT = 2, 2, 4, 0.1


def visual_states(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states of the tower's feature layer and of its last layer, (B, 1 + PATCHES, WIDTH) each."""
    out = model.model.vision_tower(pixels, output_hidden_states=True)
    return [out.hidden_states[-2], out.hidden_states[-1]]


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

    Two heads of one layer look from a noun at the patches that show it, and the noun's state after that layer tells
    what and where it is; two heads of a later layer look from the token that answers a relation at its two nouns.

    Parameters
    ----------
    asked : Pack
        The questions.
    regions : Tensor
        (B, R, N) bool: which visual tokens show each noun.
    text : int
        First text column.
    """

    def __init__(self, asked: Pack, regions: torch.Tensor, text: int) -> None:
        self.asked, self.regions, self.text = asked, regions, text
        self.losses: list[torch.Tensor] = []

    def ground(self, module, query, key, mask, kwargs) -> None:
        """Tap of layer `GROUND_LAYER`."""
        rows = self.asked.nouns.clamp(min=0) + self.text
        seen = attention_rows(module, query, key, mask, kwargs, rows)[:, :GROUND_HEADS]
        mass = (seen[..., PREFIX : self.text] * self.regions[:, None]).sum(-1)
        shown = (self.asked.nouns >= 0) & self.regions.any(-1)
        self.losses.append(-(mass + 1e-4).log().mean(1)[shown].mean())

    def relate(self, module, query, key, mask, kwargs) -> None:
        """Tap of layer `RELATE_LAYER`."""
        first, second, answering = (self.asked.pairs.clamp(min=0) + self.text).unbind(-1)
        seen = attention_rows(module, query, key, mask, kwargs, answering)
        mass = torch.cat([seen[:, h].gather(-1, at[..., None]) for h, at in enumerate((first, second))], -1)
        pairs = self.asked.pairs[..., 0] >= 0
        self.losses.append(-(mass + 1e-4).log().sum(-1)[pairs].sum() / max(int(pairs.sum()), 1))

    def name(self, heads: Heads, labels: dict[str, torch.Tensor], states: torch.Tensor) -> None:
        """Read the nouns' states after layer `GROUND_LAYER`."""
        rows = (self.asked.nouns.clamp(min=0) + self.text)[..., None].expand(-1, -1, WIDTH)
        self.losses.append(heads.noun_loss(states.gather(1, rows), labels, self.asked))


def answer(
    model: LlavaForConditionalGeneration,
    heads: Heads,
    visual: torch.Tensor,
    where: torch.Tensor,
    asked: Pack,
    labels: dict[str, torch.Tensor],
) -> Answers:
    """Answer packed questions; ``visual`` (B, N, WIDTH) stands at raster places ``where`` (B, N)."""
    size = visual.shape[0]
    embed = model.get_input_embeddings()
    inputs = torch.cat([embed(PREFIX_IDS).expand(size, -1, -1), visual, embed(asked.ids)], 1)
    positions = torch.cat([torch.arange(PREFIX).expand(size, -1), where + PREFIX, asked.positions], 1)
    text = PREFIX + visual.shape[1]
    regions = asked.regions.gather(2, where[:, None].expand(-1, asked.regions.shape[1], -1))
    pointing = Pointing(asked, regions, text)
    layers = model.model.language_model.layers
    handle = layers[GROUND_LAYER].register_forward_hook(lambda m, a, out: pointing.name(heads, labels, out))
    ground = tap(layers[GROUND_LAYER].self_attn, pointing.ground)
    with ground, tap(layers[RELATE_LAYER].self_attn, pointing.relate):
        hidden = model.model.language_model(
            inputs_embeds=inputs,
            attention_mask=attention_mask(visual.shape[1], asked.block),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
    handle.remove()
    target = asked.labels[:, 1:]
    counted = target != -100
    return Answers(model.lm_head(hidden[:, text:-1][counted]), target[counted], torch.stack(pointing.losses).sum())
