# SPDX-License-Identifier: Apache-2.0
"""What an adapter says of the decoder: arguments with a row per token, shared keys, attention that is read.

The oracle is the stock decoder: what its layers are called with, what they do when another layer is disturbed, and the
weights of its own eager attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtoken import compat
from vtoken.adapters import Adapter
from vtoken.doctor.outcome import Outcome
from vtoken.doctor.probes import Looks
from vtoken.doctor.prompts import Prompts
from vtoken.doctor.runs import Inputs, attention_backend, first_tensor, hooked, language_call, replaced, weight_of
from vtoken.engine.cache import stored_length
from vtoken.ops.ragged import compact
from vtoken.wrapping import reduce

SHORTENED_BY_THE_ENGINE = {
    *("inputs_embeds", "attention_mask", "position_ids", compat.CACHE, compat.NEW_CACHE),
    *("input_ids", "use_cache", "cache_position"),
}
CLOSE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Of attention weights, as a share of the largest one; a tenth in the short types."""


# ------------------------------------------------------------------------------------------------------------ arguments
def arguments(model: Any, adapter: Adapter, prompts: Prompts) -> Outcome:
    """Is every argument with a row per token, or per visual token, made shorter with the tokens?"""
    if adapter.outer is None:
        return Outcome("skipped", "This model encodes and scatters pictures in one call, which has no such arguments.")
    call = language_call(model, adapter, prompts.batch)
    visual = adapter.modality_in(prompts.batch) > 0
    number = visual.flatten().cumsum(0).view_as(visual)
    real = prompts.batch["attention_mask"].bool()
    index, valid = compact(real & ~(visual & (number % 2 == 0)))
    rows, left = int(visual.sum()), int((visual & (number % 2 == 1)).sum())
    before, after = _leaves(call), dict(_leaves(adapter.cut_extras(call, index, valid)))
    tried, forgotten = [], []
    for name, value in before:
        if name.partition(".")[0] in SHORTENED_BY_THE_ENGINE or value.dim() < 2:
            continue
        length = None
        if value.shape[1] == visual.shape[1] and value.shape[0] in (1, len(visual)):
            length = (1, index.shape[1])
        elif len(value) == rows:
            length = (0, left)
        if length is None:
            continue
        tried.append(name)
        if name not in after or after[name].shape[length[0]] != length[1]:
            forgotten.append(name)
    if forgotten:
        return Outcome("failed", f"The argument {forgotten[0]} keeps its rows when tokens are dropped.")
    if not tried:
        return Outcome("passed", "The language model is given no further argument with a row per token.")
    return Outcome("passed", f"Shortened with the tokens: {', '.join(tried)}.")


def _leaves(values: Any, name: str = "") -> list[tuple[str, Tensor]]:
    """Named tensors in a nest of mappings and sequences."""
    if isinstance(values, Tensor):
        return [(name, values)]
    if isinstance(values, Mapping):
        parts: Iterator[tuple[Any, Any]] = iter(values.items())
    elif isinstance(values, list | tuple):
        parts = iter(enumerate(values))
    else:
        return []
    return [leaf for key, part in parts for leaf in _leaves(part, f"{name}.{key}" if name else str(key))]


# ----------------------------------------------------------------------------------------------------------------- keys
def shared_keys(model: Any, adapter: Adapter, prompts: Prompts) -> Outcome:
    """Does each layer use the keys of the layer that the adapter names?

    Layers without keys in the cache must use another one's. A layer is disturbed while its output and the inputs of
    all others stay as they were: what changes then uses what it left behind.
    """
    cache, states = _recorded(model, adapter, prompts.first)
    layers = [n for n in range(len(adapter.layers)) if adapter.has_attention(adapter.layers[n])]
    owners = {n for n in layers if _stores(cache, n)}
    sources = {n: adapter.kv_source(n) for n in layers}
    claimed = {n: source for n, source in sources.items() if source != n}
    for n in layers:
        if n not in owners and n not in claimed:
            return Outcome(
                "failed", f"Layer {n} leaves no keys in the cache, and the adapter names no other layer for it."
            )
    wrong = []
    for source in sorted({*claimed.values()}):
        using = _disturbed(model, adapter, prompts.first, source, states)
        wrong += [n for n, named in claimed.items() if named == source and n not in using]
        wrong += [n for n in using if n in claimed and claimed[n] != source and claimed[n] not in claimed]
    if wrong:
        n = min(wrong)
        return Outcome("failed", f"The adapter says that layer {n} uses keys of layer {sources[n]}, which is not so.")
    if not claimed:
        return Outcome("passed", f"Each of {len(layers)} attending layers has its own keys.")
    return Outcome("passed", f"{len(claimed)} layers use the keys of layers {sorted({*claimed.values()})}.")


def _stores(cache: Any, layer: int) -> bool:
    held = getattr(cache, "layers", None)
    return (
        held is not None
        and layer < len(held)
        and getattr(held[layer], "keys", None) is not None
        and bool(stored_length(cache, layer))
    )


def _recorded(model: Any, adapter: Adapter, inputs: Inputs) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """The cache of a prefill, and the states that each layer was given and made."""
    states: list[tuple[Tensor, Tensor]] = []
    handles = [
        layer.register_forward_hook(
            lambda module, args, kwargs, output: states.append((_given(args, kwargs), first_tensor(output))),
            with_kwargs=True,
        )
        for layer in adapter.layers
    ]
    with hooked(handles):
        cache = compat.cache_of(model(**inputs, use_cache=True))
    return cache, states


def _given(args: tuple, kwargs: Inputs) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _disturbed(
    model: Any, adapter: Adapter, inputs: Inputs, source: int, states: list[tuple[Tensor, Tensor]]
) -> set[int]:
    """Layers that make something else when ``source`` works on other states, although all others see the same."""
    changed: set[int] = set()
    noise = torch.randn(states[source][0].shape, generator=torch.Generator().manual_seed(5), dtype=torch.float32)

    def disturb(module: nn.Module, args: tuple, kwargs: Inputs) -> Any:
        given = _given(args, kwargs)
        moved = given + noise.to(given) * given.float().std().to(given.dtype)
        return ((moved, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": moved})

    def restore(number: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            wanted = states[number][1]
            if number != source:
                moved = (first_tensor(output).float() - wanted.float()).abs().max()
                if float(moved) > 1e-3 * float(wanted.float().abs().max()):
                    changed.add(number)
            return replaced(output, wanted)

        return hook

    handles = [layer.register_forward_hook(restore(number)) for number, layer in enumerate(adapter.layers)]
    handles.append(adapter.layers[source].register_forward_pre_hook(disturb, with_kwargs=True))
    with hooked(handles):
        model(**inputs, use_cache=True)
    return changed


# ------------------------------------------------------------------------------------------------------------ attention
def attention_that_ran(model: Any, adapter: Adapter, prompts: Prompts) -> Outcome:
    """Are the attention rows that reducers read of a layer those of the model's own eager attention?"""
    return _attention(model, adapter, prompts, coming=False)


def coming_attention(model: Any, adapter: Adapter, prompts: Prompts) -> Outcome:
    """Are the attention rows of a layer that has not run yet those that it then has?"""
    return _attention(model, adapter, prompts, coming=True)


def _attention(model: Any, adapter: Adapter, prompts: Prompts, coming: bool) -> Outcome:
    attending = [n for n in range(1, len(adapter.layers)) if adapter.has_attention(adapter.layers[n])]
    own = [n for n in attending if adapter.kv_source(n) == n] or attending
    if not own:
        return Outcome("skipped", "No layer behind the first one attends.")
    layer = own[len(own) // 2]
    probe = Looks(layer=layer, coming=coming)
    with reduce(model, probe):
        model(**prompts.first, use_cache=True)
    found = probe.seen["rows"].float().cpu()
    wanted = _eager_row(model, adapter, prompts.first, layer)
    if wanted is None:
        return Outcome("skipped", "The model has no eager attention to compare with.")
    if found.shape != wanted.shape:
        return Outcome("failed", f"Layer {layer} has rows of shape {tuple(wanted.shape)}, read {tuple(found.shape)}.")
    weight = weight_of(model)
    error = float((found - wanted).abs().max() / wanted.max())
    numbers = {"layer": float(layer), "error": error}
    if error > CLOSE.get(weight.dtype, 0.1):
        return Outcome("failed", f"What is read of layer {layer} is off by {error:.1%} of its largest weight.", numbers)
    if float(wanted.std()) < 1e-2 * float(wanted.mean()):
        return Outcome("unproven", f"The attention of layer {layer} is all but uniform, which shows nothing.", numbers)
    return Outcome("passed", f"Rows of layer {layer} are those of eager attention within {error:.1e}.", numbers)


def _eager_row(model: Any, adapter: Adapter, inputs: Inputs, layer: int) -> Tensor | None:
    """(H, K): weights of the last token in the model's own eager attention of a layer; None if it has none."""
    rows: list[Tensor] = []

    def note(module: nn.Module, args: tuple, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(weights, Tensor) and weights.dim() == 4:
            rows.append(weights[0, :, -1].float().cpu())

    handles = [part.register_forward_hook(note) for part in adapter.layers[layer].modules()]
    try:
        with hooked(handles), attention_backend(model, "eager"):
            model(**inputs, use_cache=True)
    except (ValueError, NotImplementedError):
        return None
    return rows[0] if rows else None
