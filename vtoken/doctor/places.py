# SPDX-License-Identifier: Apache-2.0
"""Where visual tokens are: in the prompt, in the picture, and from which patches of the tower they come.

Each check moves something in the model's input and looks what changes: the oracle is the unwrapped model.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.adapters import Adapter
from vtoken.adapters.base import MODALITIES
from vtoken.adapters.generic import GenericAdapter
from vtoken.context import NEWLINE
from vtoken.doctor.outcome import Outcome
from vtoken.doctor.prompts import Prompts, other_values, pixel_names
from vtoken.doctor.runs import Inputs, hooked, language_call
from vtoken.engine.encode import encode
from vtoken.engine.tower import VisionReader, feature_list
from vtoken.tokenmap import TokenMap, token_map

PLACES = 8
"""Places of a picture that are painted."""
NOTICEABLE = 1e-3
"""Share of the largest feature beyond which a feature has changed."""


def placeholders(model: Any, adapter: Adapter, prompts: Prompts) -> Outcome:
    """Are the visual tokens where the model puts what it sees? Other pixels must change exactly their embeddings."""
    batch = prompts.batch
    names = pixel_names(adapter)
    moved = {name: other_values(value) if name in names else value for name, value in batch.items()}
    before, after = (language_call(model, adapter, inputs)["inputs_embeds"] for inputs in (batch, moved))
    changed = (before != after).any(-1)
    visual = adapter.modality_in(batch) > 0
    numbers = {"adapter": float(visual.sum()), "model": float(changed.sum())}
    if not bool(changed.any()):
        return Outcome("failed", "Other pixels do not change the embeddings that the language model is given.", numbers)
    outside = int((changed & ~visual).sum())
    if outside:
        return Outcome(
            "failed",
            f"The adapter finds {int(visual.sum())} visual tokens in two prompts, and {outside} tokens that the "
            "pictures change are not among them.",
            numbers,
        )
    words = model.get_input_embeddings()(batch["input_ids"])
    unmoved = visual & ~changed & (before == words).all(-1)  # separators do not change, but are no words either
    if spare := int(unmoved.sum()):
        return Outcome("failed", f"{spare} of the tokens that the adapter takes for visual are text.", numbers)
    return Outcome(
        "passed", f"{int(visual.sum())} visual tokens in two prompts, where the pictures change them.", numbers
    )


# ------------------------------------------------------------------------------------------------------------- picture
def picture_map(model: Any, adapter: Adapter, prompts: Prompts) -> Outcome:
    """Does the token whose box holds a painted place change most, among those of its view?"""
    if prompts.paint is None or prompts.size is None:
        return Outcome("skipped", "No place of these pictures can be painted: pass a processor.")
    if (items := items_of(adapter, prompts.first)) != 1:
        return Outcome("skipped", f"To the adapter the picture is {items} pictures, whose places it does not join.")
    with no_mixing(adapter):
        base = features(adapter, prompts.first)
        found = token_map(model, prompts.first, [prompts.size])
        if len(found) != len(base):
            return Outcome("failed", f"The map has {len(found)} tokens, the tower gives {len(base)}.")
        wrong, tried = [], 0
        for token in _spread(found, base):
            x0, y0, x1, y1 = found.box[token].tolist()
            x, y = (x0 + x1) / 2, (y0 + y1) / 2
            width, height = max((x1 - x0) / 4, 1.5), max((y1 - y0) / 4, 1.5)
            place = (max(x - width, 0), max(y - height, 0), x + width, y + height)
            change = (features(adapter, prompts.paint(place)) - base).norm(dim=1)
            tried += 1
            if not _holds(found, change, token, (x, y)):
                wrong.append(token)
    numbers = {"tried": float(tried), "wrong": float(len(wrong))}
    if not wrong:
        return Outcome("passed", f"{tried} painted places change the tokens whose boxes hold them.", numbers)
    text = f"{len(wrong)} of {tried} painted places change other tokens than those whose boxes hold them"
    if isinstance(adapter, GenericAdapter):
        return Outcome("refused", f"{text}: this type is served by convention, which knows no token map.", numbers)
    return Outcome("failed", f"{text}, such as that of token {wrong[0]}.", numbers)


def items_of(adapter: Adapter, inputs: Inputs) -> int:
    """Items that the prompt's pictures are to the adapter."""
    _, records = encode(adapter, VisionReader(adapter, (), False), inputs)
    kinds = adapter.modality_in(inputs)
    found = (adapter.regroup(record, kinds == MODALITIES[name]) for name, record in records.items())
    return sum(len(record.lengths) for record in found)


def _spread(found: TokenMap, base: Tensor) -> list[int]:
    """Some tokens of the first picture with a box that can be painted."""
    sides = found.box[:, 2:] - found.box[:, :2]
    usable = (found.image == 0) & (found.view != NEWLINE) & (sides > 3).all(1)
    tokens = usable.nonzero()[:, 0]
    if not len(tokens):
        return []
    return tokens[torch.linspace(0, len(tokens) - 1, min(PLACES, len(tokens))).long()].unique().tolist()


def _holds(found: TokenMap, change: Tensor, token: int, place: tuple[float, float]) -> bool:
    """Whether, of the tokens of one view, one whose box holds the place (x, y) changed most."""
    same = (found.image == found.image[token]) & (found.view == found.view[token])
    tokens = same.nonzero()[:, 0]
    x0, y0, x1, y1 = found.box[tokens[change[tokens].argmax()]].tolist()
    return x0 - 1 <= place[0] <= x1 + 1 and y0 - 1 <= place[1] <= y1 + 1


# --------------------------------------------------------------------------------------------------------------- tower
def tower_map(model: Any, adapter: Adapter, prompts: Prompts) -> Outcome:
    """Does a token change when, and only when, a patch changes that the adapter says it comes from?

    Every patch has a number; one pass for each bit marks the patches that have it, so that all tokens are told.
    """
    reader = _Calls(adapter)
    _, calls = encode(adapter, reader, prompts.first)
    modality, call = next(iter(calls.items()))
    skip = adapter.skipped_tokens(call)  # type: ignore[arg-type]
    with no_mixing(adapter):
        base = features(adapter, prompts.first)
        scale = float(base.abs().max())
        with _marking(adapter, None) as shapes:
            features(adapter, prompts.first)
        patches = sum(views * count for views, count, _ in shapes)
        wrong = torch.zeros(len(base), dtype=torch.bool)
        for bit in range(max((patches - 1).bit_length(), 1)):
            with _marking(adapter, bit) as seen:
                change = (features(adapter, prompts.first) - base).abs().amax(1)
            parts = [mark[:, skip:, None] for *_, mark in seen]
            told = adapter.pack(parts, modality, call)[:, 0].float().cpu()  # type: ignore[arg-type]
            if len(told) != len(base):
                return Outcome("failed", f"The adapter maps the tower to {len(told)} tokens of {len(base)}.")
            changed = change > NOTICEABLE * scale
            wrong |= ((told > 0.3) & ~changed) | (~(told > 0) & changed)
    numbers = {"tokens": float(len(base)), "wrong": float(wrong.sum())}
    if count := int(wrong.sum()):
        return Outcome(
            "failed", f"{count} of {len(base)} tokens come from other patches than the adapter says.", numbers
        )
    return Outcome("passed", f"All {len(base)} tokens come from the patches that the adapter says.", numbers)


class _Calls(VisionReader):
    """Gives the arguments of the ``get_*_features`` calls in the place of a record."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__(adapter, (), False)

    def __call__(self, original: Any, modality: str, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind_partial(*args, **kwargs)
        return original(*args, **kwargs), {**bound.arguments, **bound.arguments.get("kwargs", {})}


def features(adapter: Adapter, inputs: Inputs) -> Tensor:
    """(T, D) float32 on the CPU: what the model makes of the pictures of a prompt."""
    outputs, _ = encode(adapter, _Calls(adapter), inputs)
    return torch.cat([part for output in outputs.values() for part in feature_list(output)]).float().cpu()


@contextlib.contextmanager
def no_mixing(adapter: Adapter) -> Iterator[None]:
    """Attention in the tower adds nothing, so that a patch sees itself alone; where it cannot be reached, it does."""

    def silent(module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    handles = []
    with contextlib.suppress(ValueError, NotImplementedError, StopIteration, AttributeError):
        for block in range(len(adapter.tower_blocks)):
            handles.append(adapter.vision_attention(block).register_forward_hook(silent))
    with hooked(handles):
        yield


@contextlib.contextmanager
def _marking(adapter: Adapter, bit: int | None) -> Iterator[list[tuple[int, int, Tensor]]]:
    """Changes the patches whose number has a bit, where they enter the first block.

    Gives, for each call of the tower, its views, patches in each without the tokens before them, and which of all
    tokens are marked: (views, tokens) float32 on the CPU.
    """
    seen: list[tuple[int, int, Tensor]] = []
    lead = adapter.leading_tokens

    def mark(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        rows = states if states.dim() == 3 else states[None]
        views, tokens = rows.shape[0], rows.shape[1] - lead
        first = sum(count * each for count, each, _ in seen)
        number = first + torch.arange(views * tokens).view(views, tokens)
        chosen = torch.zeros_like(number) if bit is None else number >> bit & 1
        marks = torch.cat([torch.zeros(views, lead), chosen.float()], 1)
        seen.append((views, tokens, marks))
        if bit is None:
            return None
        direction = torch.randn(rows.shape[-1], generator=torch.Generator().manual_seed(3)).to(rows)
        moved = rows + marks.to(rows)[..., None] * direction * rows.float().std().to(rows.dtype)
        moved = moved.view_as(states)
        return ((moved, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": moved})

    handle = adapter.tower_blocks[0].register_forward_pre_hook(mark, with_kwargs=True)
    with hooked([handle]):
        yield seen
