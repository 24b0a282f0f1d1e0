# SPDX-License-Identifier: Apache-2.0
"""Turns on a KV cache with every argument spelled out, and what an unpruned model says to them.

Owns the arguments (ids, 2-D mask, position ids) of a prompt, of decode steps and of a text turn, and an oracle that
runs the *unwrapped* model over the whole sequence with 4-D masks. Knows nothing of how a cache is pruned: which visual
tokens are left comes from ``vtoken.stats(model).kept`` alone.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import tiny
import torch
from oracles import TOKEN_TYPES, built, explicit_masks, kept_columns, positions, visual_and_real
from torch import Tensor, nn
from transformers import DynamicCache

import vtoken


@functools.cache
def model_of(family: str, **changes) -> nn.Module:
    """One model per family and module of tests; it must be left unwrapped."""
    return tiny.make(family, (1,), **changes)[0]


@functools.cache
def prompt_of(family: str, batch: tuple[int, ...] = (1,), seed: int = 0) -> dict[str, Tensor]:
    """A left-padded batch that is never changed in place."""
    return tiny.make(family, batch, seed=seed)[1]


@contextlib.contextmanager
def wrapped(model: nn.Module, name: str, keep: float = 0.5, **options):
    """`vtoken.reduce` without gradients."""
    with vtoken.reduce(model, built(name, keep), **options), torch.no_grad():
        yield model


def new_cache(model: nn.Module) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config())


class Sequence(NamedTuple):
    """Everything that stands in a cache, as the caller knows it: all (B, L) except for M-RoPE's positions."""

    ids: Tensor
    mask: Tensor
    places: Tensor

    def before(self, length: int) -> Sequence:
        """What is left of it after a crop to ``length``."""
        return Sequence(self.ids[:, :length], self.mask[:, :length], self.places[..., :length])

    def then(self, ids: Tensor) -> Sequence:
        """It, and text that goes on counting behind its last position (from 0 if there is none)."""
        count = torch.arange(ids.shape[1])
        shape = (*self.places.shape[:-1], 1)
        top = self.places[..., -1:] if self.ids.shape[1] else self.places.new_full(shape, -1)
        if top.dim() == 3:
            top = top.amax(0, keepdim=True).expand_as(top)
        return Sequence(
            torch.cat([self.ids, ids], 1),
            torch.cat([self.mask, torch.ones_like(ids)], 1),
            torch.cat([self.places, top + 1 + count], -1),
        )

    def rows(self, index: list[int]) -> Sequence:
        """An arrangement of the rows."""
        at = torch.tensor(index)
        return Sequence(self.ids[at], self.mask[at], self.places.index_select(self.places.dim() - 2, at))


def sequence_of(model: nn.Module, inputs: dict[str, Tensor]) -> Sequence:
    """The prompt itself."""
    return Sequence(inputs["input_ids"], inputs["attention_mask"], positions(model, inputs))


def text(rows: int, length: int = 4, seed: int = 0) -> Tensor:
    """(rows, length) text tokens."""
    return torch.randint(3, 180, (rows, length), generator=torch.Generator().manual_seed(seed + 100))


def prefill(model: nn.Module, inputs: dict[str, Tensor], cache=None):
    """A cache with the prompt."""
    cache = new_cache(model) if cache is None else cache
    model(**inputs, position_ids=positions(model, inputs), past_key_values=cache, use_cache=True)
    return cache


def turn(model: nn.Module, past: Sequence, cache, ids: Tensor) -> tuple[Tensor, Sequence]:
    """(logits (B, T, V), what the cache holds then) of text on a cache that holds ``past``."""
    after = past.then(ids)
    out = model(
        input_ids=ids,
        attention_mask=after.mask,
        position_ids=after.places[..., past.ids.shape[1] :],
        past_key_values=cache,
        use_cache=True,
    )
    return out.logits, after


def steps(model: nn.Module, past: Sequence, cache, ids: Tensor) -> Sequence:
    """Decode given tokens one by one."""
    for token in ids.split(1, 1):
        _, past = turn(model, past, cache, token)
    return past


def hidden_reference(model: nn.Module, inputs: dict[str, Tensor], kept, generated: Tensor, length: int, ids: Tensor):
    """Logits (B, T, V) of the turn ``ids`` behind the first ``length`` of prompt and generated tokens.

    The unwrapped model reads prompt, generated tokens and turn in one pass. Dropped visual tokens are hidden from the
    layers on in which they are missing; what a crop removed is hidden from the turn, to which it is the future.
    """
    visual, real = visual_and_real(inputs)
    prompt = sequence_of(model, inputs)
    whole = prompt.then(generated) if generated.shape[1] else prompt
    held = whole.ids.shape[1]
    later = whole.before(length).then(ids).places[..., length:]
    total = held + ids.shape[1]
    columns = kept_columns(visual, real, kept)
    causal = torch.ones(total, total).tril().bool()
    causal[held:, length:held] = False

    def allowed(layer):
        now = [here for first, here in columns if first <= layer][-1]
        valid = torch.cat([now, now.new_ones(len(now), total - now.shape[1])], 1)
        return causal & valid[:, None]

    longer = dict(inputs, input_ids=torch.cat([whole.ids, ids], 1))
    for name in TOKEN_TYPES & inputs.keys():
        extra = torch.zeros(len(ids), total - inputs[name].shape[1], dtype=inputs[name].dtype)
        longer[name] = torch.cat([inputs[name], extra], 1)
    longer["attention_mask"] = torch.cat([whole.mask, torch.ones_like(ids)], 1)
    longer["position_ids"] = torch.cat([whole.places, later], -1)
    with explicit_masks(model, allowed), torch.no_grad():
        return model(**longer, use_cache=False).logits[:, held:]


def outcome(call):
    """(what a call gives, None), or (None, the error)."""
    try:
        return call(), None
    except Exception as error:
        return None, error


def refusal(error: BaseException) -> bool:
    """Whether an error is a sentence about the cache, and no accident of shapes."""
    words = str(error)
    named = any(word in words for word in ("cache", "pruned", "wrapped", "sliding window"))
    accident = any(word in words for word in ("size of tensor", "shape", "expanded size", "dimension", "index"))
    return isinstance(error, RuntimeError) and named and not accident and words.rstrip().endswith(".")
