# SPDX-License-Identifier: Apache-2.0
"""What the tests of kinds of fault share: cases, cached models, prompts of odd shape and a stock run by given counts.

It knows the public API only, and nothing of how the library decides or drops.
"""

from __future__ import annotations

import functools

import pytest
import tiny
import torch
from cases import pairs
from oracles import ROWWISE, alone, built, explicit_masks, kept_columns, positions, runs_of
from torch import Tensor, nn

import vtoken

KEEP = 0.5
QWEN = {"qwen2_5_vl", "qwen3_vl"}
CASES = pairs()

every_case = pytest.mark.parametrize(("family", "name"), CASES)
every_family = pytest.mark.parametrize("family", tiny.CORE)
SUPPRESSED = [tiny.IMAGE_ID, tiny.VIDEO_ID, tiny.EOS]


@functools.cache
def model_of(family: str, attn: str = "sdpa", seed: int = 0) -> nn.Module:
    """A model that all tests of a module share: each must leave it unwrapped."""
    model = tiny.make(family, (1,), seed=seed, attn=attn)[0]
    model.generation_config.eos_token_id = tiny.EOS
    return model


@functools.cache
def _inputs(family: str, counts: tuple[int, ...]) -> dict[str, Tensor]:
    return tiny.make(family, counts)[1]


def inputs_of(family: str, counts: tuple[int, ...]) -> dict[str, Tensor]:
    """Left-padded inputs with ``counts[b]`` pictures in row b; the caller may replace entries."""
    return dict(_inputs(family, counts))


def reduced(model: nn.Module, name: str, keep: float = KEEP, **options):
    """The model under a reducer, for a ``with`` block."""
    return vtoken.reduce(model, built(name, keep), **options)


def decode(model: nn.Module, inputs: dict[str, Tensor], new: int = 4, **options):
    """Greedy ids (B, S + new) and the raw logits (B, new, V) that they come from."""
    options = {"do_sample": False, "suppress_tokens": SUPPRESSED, "eos_token_id": tiny.EOS, **options}
    out = model.generate(**inputs, max_new_tokens=new, output_logits=True, return_dict_in_generate=True, **options)
    return out.sequences, torch.stack(out.logits[:new], 1)


def placed(inputs: dict[str, Tensor]) -> list[tuple[int, Tensor]]:
    """(row, positions) of every picture, in the order of the batch; no two of them touch."""
    runs = runs_of(inputs["input_ids"] == tiny.IMAGE_ID)
    return [(row, run) for row, found in enumerate(runs) for run in found]


def kept_positions(model: nn.Module, inputs: dict[str, Tensor]) -> list[tuple[int, Tensor]]:
    """(first layer, (B, S) bool) of ``vtoken.stats``: text, and visual tokens that are there from the layer on."""
    visual = inputs["input_ids"] == tiny.IMAGE_ID
    return kept_columns(visual, torch.ones_like(visual), vtoken.stats(model).kept)


def left(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """(B, S) bool: positions that went through the whole decoder and are not padding or hidden."""
    there = kept_positions(model, inputs)[-1][1]
    mask = inputs.get("attention_mask")
    return there if mask is None else there & mask.bool()


def hiding(model: nn.Module, kept: list[tuple[int, Tensor]], real: Tensor):
    """The stock model, in which each layer sees only the keys that ``kept`` says are there, by explicit masks."""
    length = real.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()

    def allowed(layer: int) -> Tensor:
        there = [mask for first, mask in kept if first <= layer][-1] & real
        return causal & there[:, None, :] | torch.eye(length, dtype=torch.bool)

    return explicit_masks(model, allowed)


def with_pictures(inputs: dict[str, Tensor], counts: tuple[int, ...], chosen: list[int]) -> dict[str, Tensor]:
    """The entries that belong to pictures, for the pictures ``chosen`` alone."""
    total = sum(counts)
    singles = [alone({**inputs, **_one_row(inputs)}, picture, (1,) * total) for picture in range(total)]
    names = inputs.keys() - ROWWISE
    return {name: torch.cat([singles[picture][name] for picture in chosen]) for name in names} if chosen else {}


def _one_row(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Row-wise entries of a batch in which every row has one picture: `alone` then slices picture by picture."""
    most = len(inputs["pixel_values"])
    return {name: inputs[name][:1].expand(most, -1) for name in ROWWISE & inputs.keys()}


def prompt(rows: list[Tensor], pictures: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """A left-padded batch of given ids, with the entries of its pictures."""
    inputs = {**tiny.assemble([[row] for row in rows], torch.Generator()), **pictures}
    if family in QWEN:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == tiny.IMAGE_ID).int()
    return inputs


def row_ids(inputs: dict[str, Tensor], row: int) -> Tensor:
    """The ids of a row without its padding."""
    return inputs["input_ids"][row][inputs["attention_mask"][row].bool()]


def up_to_picture(ids: Tensor) -> Tensor:
    """A prompt cut behind its last visual token."""
    return ids[: int((ids == tiny.IMAGE_ID).nonzero().max()) + 1]


def placed_forward(model: nn.Module, inputs: dict[str, Tensor], **options):
    """A forward pass with the position ids of ``generate``, so that it does not depend on what ran before."""
    if "position_ids" not in options:
        options["position_ids"] = positions(model, inputs)
    with torch.no_grad():
        return model(**inputs, **options)
