# SPDX-License-Identifier: Apache-2.0
"""The hook-free route: a shorter prompt for the stock model, by transformers' public interface only.

The pictures are encoded, feature rows *and* their placeholders are dropped, and the original position ids are passed.
Nothing is attached to the model, so any cache, compile mode or runtime works. In return the caller sees a shorter
prompt, and nothing can be dropped inside of the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.adapters import Adapter, adapter_for
from vtoken.adapters.base import KEPT_POSITIONS, MODALITIES, SHORTENING
from vtoken.compat import takes_encoded
from vtoken.context import Cut
from vtoken.engine.encode import encode, real_tokens
from vtoken.engine.group import Group
from vtoken.engine.masks import exceeded_window
from vtoken.engine.prompt import Prompt, place
from vtoken.engine.tower import VisionReader, VisionRecord, feature_list
from vtoken.engine.work import Work
from vtoken.ops.ragged import compact, gather
from vtoken.precision import without_autocast
from vtoken.reducers.base import Reducer
from vtoken.registry import get_reducer
from vtoken.wrapping import session_of

TYPES = ("mm_token_type_ids", "token_type_ids")


@torch.no_grad()
def shorten(
    model: nn.Module, inputs: Mapping[str, Any], reducer: str | Mapping[str, Any] | Path | Reducer, **params: Any
) -> dict[str, Any]:
    """Encode a prompt and drop visual tokens from it, without touching the model.

    Parameters
    ----------
    model : nn.Module
        An unwrapped model that `vtoken.adapters` knows.
    inputs : mapping
        What the model's processor returned.
    reducer : str, mapping, Path or Reducer
        One that acts before the language model; see `vtoken.get_reducer`.
    **params
        Parameters of the reducer, such as ``keep=0.25``.

    Returns
    -------
    dict
        Arguments for ``model.generate`` or ``model.forward``: shorter ``input_ids`` and ``attention_mask`` (B, n), the
        original ``position_ids`` of the kept tokens and ``mm_encoder_outputs``.

    Raises
    ------
    ValueError
        If the model is wrapped, or the reducer acts inside of the language model.
    NotImplementedError
        If the model does not accept encoded pictures, or the prompt exceeds its sliding window.
    """
    adapter, built = adapter_for(model), get_reducer(reducer, **params)
    _check(model, adapter, built)
    if (window := exceeded_window(adapter, 0, inputs["input_ids"].shape[1])) is not None:
        raise NotImplementedError(
            f"The prompt exceeds {window}, which the stock model would count over the kept tokens: use vtoken.wrap, "
            "which knows the original distances."
        )
    work = Work.of(adapter, built, "drop")
    reads = () if work.idle else built.encoder_reads()
    reader = VisionReader(adapter, reads, not work.idle and built.needs_projector, built.cutter, built.resampler)
    outputs, records = encode(adapter, reader, inputs)
    ids = inputs["input_ids"]
    kinds, embeds = adapter.modality(ids, None), model.get_input_embeddings()(ids).clone()  # type: ignore[operator]
    for modality, output in outputs.items():
        rows = torch.cat(feature_list(output))
        embeds[kinds == MODALITIES[modality]] = rows.to(embeds.dtype)
    keep, hidden = _choose(adapter, built, work, kinds, records, embeds, real_tokens(inputs))
    for modality, output in outputs.items():
        here = kinds == MODALITIES[modality]
        output = type(output)(**output)
        _cut_features(output, hidden[here], keep[here])
        outputs[modality] = output
    return {**_shorter(model, inputs, keep), "mm_encoder_outputs": outputs}


def _choose(
    adapter: Adapter,
    reducer: Reducer,
    work: Work,
    kinds: Tensor,
    records: Mapping[str, VisionRecord],
    embeds: Tensor,
    real: Tensor,
) -> tuple[Tensor, Tensor]:
    """Tokens (B, S) that stay, and the embeddings (B, S, D) with what was merged into them."""
    prompt = Prompt.of(place(adapter, kinds, records, real, reducer.encoder_reads()), real, None, None)
    group = Group.whole(prompt)
    ctx = prompt.context(embeds, group.view, adapter, reducer.newlines)
    cut = None
    if not work.idle:
        with without_autocast(embeds.device):
            cut = reducer.before_llm(ctx)
    cut = Cut(ctx.valid) if cut is None else cut
    return group.stays(ctx.kept(cut)), group.rewritten(embeds, cut)


def _check(model: nn.Module, adapter: Adapter, reducer: Reducer) -> None:
    if session_of(model) is not None:
        raise ValueError("The model is wrapped, its prompts are shortened already: call vtoken.unwrap(model) first.")
    why = adapter.limits.get(SHORTENING, adapter.limits.get(KEPT_POSITIONS))  # the original ones are handed over
    if why is not None:
        raise NotImplementedError(
            f"{type(model).__name__} {why}, so that its prompts cannot be shortened: use vtoken.wrap."
        )
    depth = len(adapter.layers)
    if reducer.layers(depth) or reducer.taps(depth) or reducer.light_layers(depth):
        raise ValueError(
            f"Reducer {reducer.name!r} acts inside of the language model, which a shorter prompt cannot express: "
            "use vtoken.wrap, or a reducer that acts before the language model."
        )
    outer = adapter.outer
    if outer is not None and not takes_encoded(outer):
        raise NotImplementedError(
            f"{type(model).__name__} accepts no encoded pictures (mm_encoder_outputs) in this transformers version: "
            "use vtoken.wrap, or transformers >= 5.18."
        )


def _cut_features(output: Any, rows: Tensor, keep: Tensor) -> None:
    """Replace the features of an encoder's output by the kept ``rows`` of (T, D)."""

    def same_kind(old: Any, rows: Tensor) -> Any:
        if isinstance(old, Tensor):
            return rows[None] if old.dim() == 3 else rows
        counts = keep.split([part.flatten(0, -2).shape[0] for part in old])
        return list(rows.split([int(part.sum()) for part in counts]))

    name = "last_hidden_state" if output.pooler_output is None else "pooler_output"  # Fuyu has no pooler
    setattr(output, name, same_kind(getattr(output, name), rows[keep]))
    if (deepstack := getattr(output, "deepstack_features", None)) is not None:
        output.deepstack_features = [same_kind(layer, torch.cat(feature_list(layer))[keep]) for layer in deepstack]


def _shorter(model: Any, inputs: Mapping[str, Any], keep: Tensor) -> dict[str, Tensor]:
    """Token-wise inputs of the kept tokens (B, S), left padded."""
    index, valid = compact(keep)
    positions = inputs.get("position_ids")
    if positions is None:
        others = {name: value for name, value in inputs.items() if name != "input_ids"}
        positions = model._prepare_position_ids_for_generation(inputs["input_ids"], others)
    pad = model.generation_config.pad_token_id or 0
    out = {
        "input_ids": torch.where(valid, gather(inputs["input_ids"], index), pad),
        "attention_mask": valid.long(),
        "position_ids": gather(positions, index, dim=positions.dim() - 1, batch=positions.dim() - 2),
    }
    for name in TYPES:
        if inputs.get(name) is not None:
            out[name] = torch.where(valid, gather(inputs[name], index), 0)
    return out
