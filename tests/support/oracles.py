# SPDX-License-Identifier: Apache-2.0
"""Independent references for pruned runs, and small helpers of the session tests."""

from __future__ import annotations

import contextlib
import functools
import sys
from dataclasses import dataclass

import pytest
import tiny
import torch
from torch import Tensor, nn

import vtoken
from vtoken.adapters import adapter_for
from vtoken.reducers.base import KeepReducer, Reducer

GREEDY = {"do_sample": False, "suppress_tokens": [tiny.IMAGE_ID, tiny.VIDEO_ID]}
TOLERANCE = {"atol": 5e-5, "rtol": 1e-4}


def built(name: str, keep: float = 0.25) -> Reducer:
    """A registered reducer; those that have no keep ratio as they are."""
    reducer = vtoken.get_reducer(name)
    return vtoken.get_reducer(name, keep=keep) if isinstance(reducer, KeepReducer) else reducer


def content_score(features: Tensor) -> Tensor:
    """A fixed random projection: the same choice for a token wherever it stands."""
    weight = torch.randn(features.shape[-1], generator=torch.Generator().manual_seed(0))
    return features.float() @ weight


@dataclass(frozen=True)
class TestReducer(Reducer):
    """Cuts by content before the language model (``before``) and before given layers; a ratio of what is left."""

    __test__ = False
    name = "test"
    before: float | None = None
    at: tuple[tuple[int, float], ...] = ()

    def _cut(self, ctx, ratio):
        scores = content_score(ctx.features)
        index = vtoken.ops.top_k(scores, (ctx.valid.sum(1) * ratio).round().long(), ctx.valid)
        return ctx.cut(index)

    def before_llm(self, ctx):
        return None if self.before is None else self._cut(ctx, self.before)

    def layers(self, depth):
        return tuple(layer for layer, _ in self.at)

    def at_layer(self, layer, ctx):
        return self._cut(ctx, dict(self.at)[layer])


PLANS = {
    "before": TestReducer(before=0.4),
    "inside": TestReducer(at=((1, 0.5), (3, 0.0))),
    "both": TestReducer(before=0.7, at=((2, 0.4),)),
    "drop all": TestReducer(before=0.0),
    "exit": TestReducer(at=((2, 0.0),)),
}


def language_model(model: nn.Module) -> nn.Module:
    if hasattr(model, "layers"):
        return model
    return getattr(model.model, "language_model", None) or model.model.text_model


def visual_and_real(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    ids = inputs["input_ids"]
    return (ids == tiny.IMAGE_ID) | (ids == tiny.VIDEO_ID), inputs["attention_mask"].bool()


def runs_of(visual: Tensor, lengths: list[int] | None = None) -> list[list[Tensor]]:
    """Per row the positions of each item.

    The tiny inputs put text between items, so that an unbroken run of visual tokens is one; ``lengths`` are the items'
    lengths where that does not hold (a clip with timestamps between its frames).
    """
    out = []
    waiting = list(lengths or ())
    for row in visual:
        places = row.nonzero()[:, 0]
        gaps = (places.diff() > 1).nonzero()[:, 0] + 1
        if lengths:
            taken: list[int] = []
            while sum(taken) < len(places):
                taken.append(waiting.pop(0))
            gaps = torch.tensor(taken).cumsum(0)[:-1]
        out.append(list(places.tensor_split(gaps.tolist())) if len(places) else [])
    return out


def kept_columns(visual: Tensor, real: Tensor, kept: list[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
    """(first layer, (B, S) bool of columns that are there from it on), from `vtoken.Stats.kept`."""
    out = []
    for layer, found in kept:
        here, item = real & ~visual, 0
        for row, runs in enumerate(runs_of(visual)):
            for run in runs:
                here[row, run] = found[item, : len(run)]
                item += 1
        assert item == len(found)
        out.append((layer, here))
    return out


@contextlib.contextmanager
def explicit_masks(model: nn.Module, allowed):
    """The decoder layers see ``allowed(layer)`` (B, Q, K) bool instead of the mask that the model made."""

    def hook(index, module, args, kwargs):
        allow = allowed(index)[:, None]
        mask = torch.zeros(allow.shape).masked_fill(~allow, torch.finfo(torch.float32).min)
        return args, {**kwargs, "attention_mask": mask}

    handles = [
        layer.register_forward_pre_hook(functools.partial(hook, index), with_kwargs=True)
        for index, layer in enumerate(language_model(model).layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def masked_oracle(model: nn.Module, plan: TestReducer, visual: Tensor, real: Tensor, lengths: list[int] | None = None):
    """The stock model on the full sequence, with dropped keys hidden by an explicit 4-D mask where layers attend.

    Gives a dictionary whose ``"valid"`` (B, S) is what the layer at work sees, for layers that attend to nothing.
    """
    cuts = dict(plan.at)
    length = visual.shape[1]
    state = {"now": real}

    def choose(hidden: Tensor, ratio: float, now: Tensor) -> Tensor:
        keep = now & ~visual
        for row, runs in enumerate(runs_of(visual, lengths)):
            for run in runs:
                left = run[now[row, run]]
                scores = content_score(hidden[row, left])
                number = int((torch.tensor(float(len(left))) * ratio).round())
                keep[row, left[scores.sort(descending=True, stable=True).indices[:number]]] = True
        return keep

    def hook(index: int, module: nn.Module, args: tuple, kwargs: dict):
        hidden = args[0]
        if hidden.dim() == 4:  # residual streams
            hidden = hidden.permute(1, 2, 0, 3).flatten(2)
        if index == 0:
            state["now"] = real if plan.before is None else choose(state["embeds"][:, :length], plan.before, real)
        if index in cuts:
            state["now"] = choose(hidden[:, :length], cuts[index], state["now"])
        total = hidden.shape[1]
        valid = torch.cat([state["now"], state["now"].new_ones(len(hidden), total - length)], 1)
        state["valid"] = valid
        base = kwargs.get("attention_mask")
        if base is not None and base.dim() == 2:  # a recurrent layer
            return args, kwargs
        if base is None:
            base = torch.ones(total, total).tril().bool()[None, None]
        if base.dtype != torch.bool:
            base = base == 0
        allow = base.expand(len(hidden), -1, -1, -1) & valid[:, None, None]
        mask = torch.zeros(allow.shape, dtype=hidden.dtype).masked_fill(~allow, torch.finfo(hidden.dtype).min)
        return args, {**kwargs, "attention_mask": mask}

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        state["embeds"] = kwargs["inputs_embeds"]
        if kwargs.get("vision_mask") is not None:  # Granite 4 Vision: embeddings are zero, features come with layer 0
            state["embeds"] = state["embeds"].masked_scatter(kwargs["vision_mask"], kwargs["deepstack_features"][0])

    language = language_model(model)
    layers = language.layers
    handles = [
        language.register_forward_pre_hook(note, with_kwargs=True),
        *(
            layer.register_forward_pre_hook(
                lambda module, args, kwargs, index=index: hook(index, module, args, kwargs), with_kwargs=True
            )
            for index, layer in enumerate(layers)
        ),
    ]
    try:
        yield state
    finally:
        for handle in handles:
            handle.remove()


def positions(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The position ids that ``generate`` would use."""
    kwargs = dict(inputs)
    return model._prepare_position_ids_for_generation(kwargs.pop("input_ids"), kwargs)


def extended(model: nn.Module, inputs: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """Inputs with generated tokens appended, and the positions that decoding counts up to: a forward without cache."""
    out = dict(inputs)
    out["input_ids"] = torch.cat([inputs["input_ids"], tokens], 1)
    out["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1)
    for name in TOKEN_TYPES & inputs.keys():  # PaliGemma: the answer is the causal suffix, type 1
        kind = int(model.config.model_type == "paligemma")
        out[name] = torch.cat([inputs[name], torch.full_like(tokens, kind).to(inputs[name].dtype)], 1)
    start = positions(model, inputs)
    later = start[..., -1:] + torch.arange(1, tokens.shape[1] + 1)
    out["position_ids"] = torch.cat([start, later], -1)
    return out


TOKEN_TYPES = {"mm_token_type_ids", "token_type_ids"}
ROWWISE = {"input_ids", "attention_mask", *TOKEN_TYPES}


def alone(inputs: dict[str, Tensor], row: int, counts: tuple[int, ...]) -> dict[str, Tensor]:
    """Row ``row`` without its padding and with its own pictures, of a batch with ``counts`` pictures in the rows."""
    at = inputs["attention_mask"][row].bool()
    first, last = sum(counts[:row]), sum(counts[: row + 1])
    out = {name: value[row : row + 1, at] for name, value in inputs.items() if name in ROWWISE}
    if first == last:
        return out
    for name in inputs.keys() - ROWWISE:
        value = inputs[name]
        grid = inputs.get("video_grid_thw" if "video" in name else "image_grid_thw")
        if name.startswith("pixel_values") and grid is not None:
            out[name] = torch.cat(value.split(grid.prod(1).tolist())[first:last])
        elif value.dim() == 5 and "image_sizes" not in inputs and "video" not in name:  # Idefics 3: a row of tiles
            out[name] = value[row : row + 1, : last - first]
        elif name == "pixel_values" and len(value) > sum(counts):  # InternVL: several tiles for a picture
            tiles = [tiny.TILES[i % len(tiny.TILES)] for i in range(sum(counts))]
            out[name] = torch.cat(value.split(tiles)[first:last])
        else:
            out[name] = value[first:last]
    return out


def generate(model: nn.Module, inputs: dict[str, Tensor], new: int = 6, **kwargs):
    return model.generate(**inputs, max_new_tokens=new, **{**GREEDY, **kwargs})


def check_rows_and_masking(model, inputs, reducer, images_per_row, new):
    """A batch gives each row what it gives alone, and hiding tokens the ids that dropping them gives."""
    with vtoken.reduce(model, reducer), torch.no_grad():
        together = model(**inputs).logits
        ids = generate(model, inputs, new)
        for row in range(len(images_per_row)):
            logits = model(**alone(inputs, row, images_per_row)).logits
            torch.testing.assert_close(together[row : row + 1, -logits.shape[1] :], logits, **TOLERANCE)
    with vtoken.reduce(model, reducer, backend="mask"):
        assert torch.equal(generate(model, inputs, new), ids)


def eager_weights(block, run):
    """Attention weights (rows, H, Q, K) of an attention module while ``run`` runs eagerly, one entry per call of it."""
    source, found = sys.modules[type(block).__module__], []

    def spied(original):
        def spy(module, *args, **kwargs):
            out = original(module, *args, **kwargs)
            if module is block:
                found.append(out[1])
            return out

        return spy

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for name in ("eager_attention_forward", "vision_eager_attention_forward"):  # Llama 4 has both
            if hasattr(source, name):
                patch.setattr(source, name, spied(getattr(source, name)))
        run()
    return found


def eager_encoder(family, batch, layer, **changes):
    """Eager attention weights (views, H, patches, patches) of one tower layer, one entry per call of its attention."""
    model, inputs = tiny.make(family, batch, attn="eager", **changes)
    return eager_weights(adapter_for(model).vision_attention(layer), lambda: model(**inputs))


@dataclass(frozen=True)
class Look(Reducer):
    """Records what it is shown, cuts nothing."""

    name = "look"
    reads: tuple = ()

    def __post_init__(self):
        object.__setattr__(self, "seen", {})

    def encoder_reads(self):
        return self.reads

    def before_llm(self, ctx):
        self.seen["ctx"] = ctx
