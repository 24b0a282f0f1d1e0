# SPDX-License-Identifier: Apache-2.0
"""The first layers of a decoder learn where each visual token is, from rotary positions alone.

A tower without absolute positions leaves this to the decoder. Learned beside the questions it takes thousands of steps;
learned alone, on the first layers only, it takes minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from vtoken.mini.training.answering import PLACE_LAYER, Prompt, kept_columns, places_of, prefix_of, rotary
from vtoken.mini.training.labels import IGNORE
from vtoken.mini.training.supervision import Heads

LEAST_SHOWN = 0.4  # of the visual tokens of a document: pruned pictures too say where their tokens are


@contextmanager
def shallow(decoder: Any, depth: int) -> Iterator[None]:
    """Only the first layers run."""
    layers = decoder.layers
    decoder.layers = layers[:depth]
    try:
        yield
    finally:
        decoder.layers = layers


def place_loss(
    model: Any,
    heads: Heads,
    visual: torch.Tensor,
    prompt: Prompt,
    labels: dict[str, torch.Tensor],
    rng: np.random.Generator,
) -> torch.Tensor:
    """Loss of what `PLACE_FIELDS` name, of the visual tokens (B, N, WIDTH), of which a random part is shown."""
    shown = max(1, int(visual.shape[1] * rng.uniform(LEAST_SHOWN, 1.0)))
    order = torch.rand(visual.shape[:2]) + 10.0 * (labels["letter"] != IGNORE)  # whose place in a word is learned too
    where = order.topk(shown, 1).indices
    columns = kept_columns(prompt, where)
    decoder, states = model.model.language_model, []
    read = decoder.layers[PLACE_LAYER].register_forward_hook(lambda m, a, out: states.append(out))
    with shallow(decoder, PLACE_LAYER + 1):
        decoder(
            inputs_embeds=prefix_of(model, visual, prompt, columns),
            position_ids=rotary(prompt.positions[:, columns]),
            use_cache=False,
        )
    read.remove()
    return heads.place_loss(states[0][torch.isin(columns, prompt.slots)], places_of(labels, where))
