# SPDX-License-Identifier: Apache-2.0
"""The adapter of every model type that has no file of its own: what follows transformers' conventions is found.

It looks at the modules of a model, never at its name: which module merges pictures into the prompt, where the decoder
layers are, and which argument is one row per token. What cannot be right by convention is refused when the model is
wrapped, with the reason. It must not know any family.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from vtoken.adapters.base import IMAGE, MODALITIES, VIDEO, equal_views, single_view, squarest_grid
from vtoken.adapters.marking import MarkedAdapter
from vtoken.adapters.qwen3_vl import cut_rows, follow_deepstack
from vtoken.context import NEWLINE, ItemLayout
from vtoken.ops.ragged import gather, run_lengths

if TYPE_CHECKING:
    from vtoken.engine.hooks import AdapterHooks
    from vtoken.engine.tower import VisionRecord

SUPPORTED = "the families in docs/families.md, and vtoken doctor shows what works on a type that is not among them"
NESTED = ("language_model", "text_model", "model", "decoder", "transformer", "backbone")
"""Names under which a module holds the language model, or that holds its layers."""
PLACEHOLDERS = ("{}_token_id", "{}_token_index", "{}_patch_id")
"""Names under which a config holds the placeholder of a modality."""
POOLED = ("index_block_size", "index_kpool", "indexer_compress_ratio")
"""Names under which a config holds how many neighbouring keys are chosen together."""
WINDOWED = ("sliding_attention", "chunked_attention")
KINDS = ("full_attention", "linear", "conv", "mamba", "moe", "mlp", "indexed_attention")
"""What the kind of a decoder layer has in it that is understood, beside windows."""
ATTENTION = ("self_attn", "attn", "attention", "self_attention", "mixer")
NORMS = ("input_layernorm", "operator_norm", "attention_norm", "attn_norm", "norm1", "norm")
"""Names of the norm before the attention of a decoder layer."""
STREAMS = ("altup_num_inputs", "hc_mult", "hc_count")
"""Names under which a config holds the number of residual streams."""
RECURRENT = ("linear", "delta", "mamba", "conv", "recurrent")
"""What a module that is no attention may have in the name of its class."""


class GenericAdapter(MarkedAdapter):
    """Any vision-language model of transformers that merges its pictures before a causal decoder.

    Parameters
    ----------
    model : nn.Module
        The model that the user calls ``generate`` on.

    Raises
    ------
    TypeError
        If the model does not follow the conventions, or has no visual tokens in its decoder: one sentence says which.
    """

    model_types: ClassVar[tuple[str, ...]] = (
        "aria",
        "cohere_compass",
        "cosmos3_edge",
        "cosmos3_omni",
        "deepseek_ocr2",
        "deepseek_vl",
        "deepseek_vl_hybrid",
        "dots3_note",
        "emu3",
        "ernie4_5_vl_moe",
        "exaone4_5",
        "fast_vlm",
        "fuyu",
        "gemma3n",
        "gemma4",
        "gemma4_unified",
        "glm46v",
        "glm4v",
        "glm4v_moe",
        "glm_ocr",
        "glmga",
        "got_ocr2",
        "granite_docling",
        "hunyuan_vl",
        "hyperclovax_vision_v2",
        "idefics2",
        "janus",
        "kimi_k25",
        "lfm2_vl",
        "lfm3_vl",
        "lighton_ocr",
        "minicpm_ocr",
        "minicpmv4_6",
        "minicpmv4_7",
        "mistral3",
        "mistral_large4",
        "molmo2",
        "muse_glimmer",
        "muse_spark",
        "nemotron_h_omni",
        "ovis2",
        "paddleocr_vl",
        "perception_lm",
        "pp_chart2table",
        "qianfan_ocr",
        "qwen2_5_omni_thinker",
        "qwen3_omni_moe_thinker",
        "shieldgemma2",
        "step3p7",
        "video_llama_3",
        "video_llava",
    )
    """Types that the tests run; any other is tried all the same."""
    answers: ClassVar[frozenset[str]] = frozenset()
    """`CHECKS` that a family's own adapter makes superfluous."""

    def __init__(self, model: nn.Module) -> None:
        self.model = self.generator = model
        check_kind(model)
        self.outer = find_outer(model)
        self.language_model = find_language_model(self.outer)
        self.layers = self.language_model.layers
        self.placeholders = {code: self._placeholder(name) for name, code in MODALITIES.items()}
        if self.placeholders[IMAGE] == self.placeholders[VIDEO]:
            self.placeholders[VIDEO] = None  # clips stand behind the placeholders of pictures
        self.pixel_keys = pixel_arguments(self.outer)
        for question, check in CHECKS.items():
            if question not in self.answers:
                check(type(model).__name__, model, self.language_model)

    def check_parts(self) -> None:
        """Nothing: some types have no tower, and what is missing was not found."""

    def _placeholder(self, modality: str) -> int | None:
        names = [name.format(modality) for name in PLACEHOLDERS]
        configs = (self.model.config, getattr(self.outer, "config", None))
        found = (getattr(config, name, None) for config in configs for name in names)
        return next((token for token in found if token is not None), None)

    def modality_in(self, call: Mapping[str, Any]) -> Tensor:
        """Also tells clips that stand behind the placeholders of pictures, by the token types where there are both."""
        kinds = super().modality_in(call)
        encoded = {name for name, output in (call.get("mm_encoder_outputs") or {}).items() if output is not None}
        brought = encoded | {
            "video" if "video" in key else "image" for key in self.pixel_keys if call.get(key) is not None
        }
        if VIDEO not in kinds and "video" in brought:
            types = call.get("mm_token_type_ids")
            clips = kinds == IMAGE
            if "image" in brought:
                clips = clips & (types[:, -kinds.shape[1] :] == VIDEO) if types is not None else torch.zeros_like(clips)
            kinds = torch.where(clips, VIDEO, kinds)
        return kinds

    # ------------------------------------------------------------------ decoder
    def attention(self, layer: Any) -> nn.Module:
        found = attention_of(layer)
        if found is None:
            raise NotImplementedError(f"{type(layer).__name__} has no attention module: choose a layer that attends.")
        return found

    def has_attention(self, layer: Any) -> bool:
        return attention_of(layer) is not None

    def kv_source(self, layer: int) -> int:
        return self._sources[layer]

    @functools.cached_property
    def _sources(self) -> list[int]:
        config, own = self.language_model.config, list(range(len(self.layers)))
        if (named := getattr(config, "kv_source_layers", None)) is not None:
            chosen = getattr(config, "indexer_types", None) or ["full"] * len(own)
            makers = [i for i in own if chosen[i] == "full"]
            return [min(named[i], max(maker for maker in makers if maker <= i)) for i in own]
        first = len(own) - (getattr(config, "num_kv_shared_layers", None) or 0)
        kinds = getattr(config, "layer_types", None) or [""] * len(own)  # a layer shares with the last one of its kind
        return [i if i < first else max(j for j in own[:first] if kinds[j] == kinds[i]) for i in own]

    @property
    def attention_norm(self) -> str:  # type: ignore[override]
        """Name of the norm before the attention of a decoder layer.

        Raises
        ------
        NotImplementedError
            If attention that is yet to come cannot be read: the layers have no such norm under a usual name, or their
            attention needs more than states and positions.
        """
        layer = next(layer for layer in self.layers if self.has_attention(layer))
        block, config = self.attention(layer), self.language_model.config
        if several := next((name for name in STREAMS if (getattr(config, name, None) or 1) > 1), None):
            raise NotImplementedError(
                f"{type(layer).__name__} mixes {getattr(config, several)} residual streams ({several}) before it "
                "attends, so that attention which is yet to come cannot be read: use a reducer that reads layers which "
                "ran."
            )
        given = inspect.signature(block.forward).parameters.values()
        needed = [one.name for one in given if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
        if {*needed} - {"hidden_states", "position_embeddings", "attention_mask"} or hasattr(block, "indexer"):
            raise NotImplementedError(
                f"{type(block).__name__} needs more than states and positions, so that attention which is yet to come "
                "cannot be read: use a reducer that reads layers which ran."
            )
        found = next((name for name in NORMS if isinstance(getattr(layer, name, None), nn.Module)), None)
        if found is None:
            raise NotImplementedError(
                f"{type(layer).__name__} has no norm before its attention under a usual name ({', '.join(NORMS)}), so "
                "that attention which is yet to come cannot be read: use a reducer that reads layers which ran."
            )
        return found

    def cut_extras(self, kwargs: dict[str, Any], index: Tensor, valid: Tensor) -> dict[str, Any]:
        """Shorten every argument that has a row per token (B, S, ...) or per visual token (V, D)."""
        cutter = _Cutter(kwargs, index, valid)
        out = {name: value if name in _HANDLED else cutter.cut(value) for name, value in kwargs.items()}
        if "logits_to_keep" in kwargs:  # every row is wanted: they are brought back to their places first
            out["logits_to_keep"] = 0
        return out

    def install(self, hooks: AdapterHooks) -> None:
        if hasattr(self.language_model, "_deepstack_process"):
            follow_deepstack(hooks, self.language_model)
        for layer in self.layers:
            if "conv_mask" in inspect.signature(layer.forward).parameters:
                hooks.replace(layer, "forward", _padded(hooks))

    # ------------------------------------------------------------------ pictures
    @property
    def tower(self) -> Any:
        found = self.model.get_encoder(modality="image")
        if found is not self.model and found is not self.outer:
            return found
        inside = set(self.language_model.modules())
        others = [part for name, part in self.outer.named_children() if "audio" not in name]
        return max((part for part in others if not inside & {*part.modules()}), key=_size)

    @property
    def tower_blocks(self) -> nn.ModuleList:
        """The longest list of modules that attend.

        Raises
        ------
        ValueError
            If the tower has none, as convolutional ones and those of other packages.
        """
        lists = [part for part in self.tower.modules() if isinstance(part, nn.ModuleList) and len(part)]
        attending = [part for part in lists if any(attention_of(block) is not None for block in part)]
        if not attending:
            raise ValueError(
                f"The vision tower of {type(self.model).__name__} has no attention that can be read: use a reducer "
                "that needs no encoder attention."
            )
        return max(attending, key=len)

    def vision_attention(self, layer: int | float) -> nn.Module:
        found = attention_of(self.tower_blocks[self.tower_block(layer)])
        if found is None:
            raise ValueError(
                f"Block {layer} of the vision tower of {type(self.model).__name__} does not attend: name another one."
            )
        return found

    @functools.cached_property
    def global_blocks(self) -> tuple[int, ...]:
        return tuple(n for n in super().global_blocks if attention_of(self.tower_blocks[n]) is not None)

    def read_block(self, layer: int | float) -> int:
        if isinstance(layer, int) and layer >= 0:
            self.vision_attention(layer)  # or say that it has none
        return super().read_block(layer)

    def item_lengths(self, features: list[Tensor], call: dict[str, Any]) -> list[int]:
        """Tokens of each entry; where all pictures are one tensor, as the grids in the call divide it."""
        total = sum(map(len, features))
        grids = _grids(call)
        if len(features) == 1 and grids is not None and total and not int(grids.prod(1).sum()) % total:
            patches = int(grids.prod(1).sum()) // total
            sizes = grids.prod(1)
            if not bool((sizes % patches).any()):
                return (sizes // patches).tolist()
        return [len(entry) for entry in features]

    def regroup(self, record: VisionRecord, here: Tensor) -> VisionRecord:
        """Unbroken runs of placeholders are the items where the entries of the features are something else.

        Raises
        ------
        NotImplementedError
            If there is not one placeholder for each feature.
        """
        counts, runs = here.sum(1).tolist(), run_lengths(here)
        if sum(counts) != sum(record.lengths):
            raise NotImplementedError(
                f"{type(self.model).__name__} has {sum(counts)} placeholders in the prompt for {sum(record.lengths)} "
                "visual features, so that they cannot be told apart by convention: it needs an adapter of its own "
                "(docs/adding-a-family.md), or pass the pictures that the prompt names, and no others."
            )
        if max(record.lengths, default=0) > 1 and _fill(record, counts, runs):
            return record
        return replace(record, lengths=runs, layouts=[single_view(*squarest_grid(length)) for length in runs])

    def layouts(self, modality: str, call: dict[str, Any], lengths: list[int]) -> list[ItemLayout]:
        """Grids as the call names them (time, height, width, or pixels), else the most square ones."""
        grids, sizes = _grids(call), call.get("image_sizes")
        if grids is not None and len(grids) == len(lengths):
            return [_layout(t, h, w, length) for (t, h, w), length in zip(grids.tolist(), lengths, strict=True)]
        if isinstance(sizes, Tensor) and sizes.shape == (len(lengths), 2):
            return [_of_size(*size, length) for size, length in zip(sizes.tolist(), lengths, strict=True)]
        return [single_view(*squarest_grid(max(length, 1))) for length in lengths]


# ------------------------------------------------------------------------------------------------------ finding things
def check_kind(model: nn.Module) -> None:
    """Refuse models whose visual tokens are not in a causal decoder.

    Raises
    ------
    TypeError
        One sentence with the reason.
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    if config is None:
        raise TypeError(f"No adapter knows the model {name}: supported are {SUPPORTED}.")
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(
            f"{name} is an encoder-decoder model: its visual tokens are in the encoder, and the decoder that generates "
            "holds none that could be dropped."
        )
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    if any("crossatt" in (key + type(part).__name__).lower().replace("_", "") for key, part in decoder.named_modules()):
        raise TypeError(
            f"{name} reads what stands beside the text by cross attention: its decoder holds no visual tokens that "
            "could be dropped."
        )
    if not any(_encodes(module) for module in model.modules()):
        raise TypeError(
            f"{name} has no get_image_features or get_video_features, by which visual tokens are found: it needs an "
            "adapter of its own (docs/adding-a-family.md), if it has pictures at all."
        )
    if not hasattr(model, "get_decoder"):
        raise TypeError(f"{name} has no get_decoder, by which the language model is found: supported are {SUPPORTED}.")


def _encodes(module: nn.Module) -> bool:
    return hasattr(type(module), "get_image_features") or hasattr(type(module), "get_video_features")


def find_outer(model: Any) -> nn.Module:
    """The innermost module that encodes pictures and holds the decoder: the one that merges them into the prompt."""
    decoder = model.get_decoder()
    holding = [part for part in model.modules() if _encodes(part) and any(inner is decoder for inner in part.modules())]
    if not holding:
        raise TypeError(
            f"{type(model).__name__} encodes pictures outside of the module that holds its decoder, so that where they "
            "are merged cannot be found: it needs an adapter of its own (docs/adding-a-family.md)."
        )
    return holding[-1]


def find_language_model(outer: Any) -> nn.Module:
    """The module with the decoder layers, which is called with embeddings."""
    found = next(
        (getattr(outer, name) for name in NESTED[:2] if isinstance(getattr(outer, name, None), nn.Module)), None
    )
    found = outer.get_decoder() if found is None else found
    while not isinstance(getattr(found, "layers", None), nn.ModuleList):
        inner = [getattr(found, name, None) for name in NESTED]
        following = next((part for part in inner if isinstance(part, nn.Module)), None)
        if following is None:
            raise TypeError(
                f"{type(found).__name__} has no list of layers, nor a part under one of the names {', '.join(NESTED)} "
                "that has: it needs an adapter of its own (docs/adding-a-family.md)."
            )
        found = following
    if found is outer:
        raise TypeError(
            f"The decoder of {type(outer).__name__} itself merges pictures into the prompt, so that nothing can be "
            "dropped before it: it needs an adapter of its own (docs/adding-a-family.md)."
        )
    return found


def pixel_arguments(outer: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of the outer module that bring pictures."""
    names = inspect.signature(outer.forward).parameters
    return tuple(name for name in names if ("pixel_values" in name or name.endswith("patches")) and "mask" not in name)


def check_distances(name: str, model: Any, language: Any) -> None:
    """Refuse decoders that know no position ids."""
    if any("relative" in type(part).__name__.lower() for layer in language.layers for part in layer.modules()):
        raise TypeError(
            f"{name} counts distances between tokens by the rows that are there, so that dropping some would move the "
            "others: it needs an adapter of its own (docs/adding-a-family.md)."
        )


def check_blocks(name: str, model: Any, language: Any) -> None:
    """Refuse decoders that choose several neighbours at once."""
    if (block := next((key for key in POOLED if getattr(language.config, key, None)), None)) is not None:
        raise TypeError(
            f"{name} chooses keys in blocks of {getattr(language.config, block)} neighbours ({block}), which dropping "
            "tokens would divide otherwise: it needs an adapter of its own (docs/adding-a-family.md)."
        )


def check_kinds(name: str, model: Any, language: Any) -> None:
    """Refuse decoders with layers of an unknown kind."""
    kinds = {*(getattr(language.config, "layer_types", None) or ())}
    if unknown := sorted(kind for kind in kinds - {*WINDOWED} if not any(word in kind for word in KINDS)):
        raise TypeError(
            f"{name} has decoder layers of the kind {unknown[0]!r}, to which it is not known what a dropped "
            "token means: it needs an adapter of its own (docs/adding-a-family.md)."
        )


def check_deepstack(name: str, model: Any, language: Any) -> None:
    """Refuse decoders that add features between layers in a way that cannot be followed."""
    names = inspect.signature(language.forward).parameters
    if any("deepstack" in key for key in names) and not hasattr(language, "_deepstack_process"):
        raise TypeError(
            f"{name} adds visual features between its decoder layers in code that cannot be told of a cut: it needs an "
            "adapter of its own (docs/adding-a-family.md)."
        )


def check_generate(name: str, model: Any, language: Any) -> None:
    """Refuse models whose ``generate`` would not meet the hooks."""
    if own_generate(model, language):
        raise TypeError(
            f"generate() of {name} bypasses its forward and calls the language model itself, so that a wrapped model "
            "would silently drop nothing: it needs an adapter of its own (docs/adding-a-family.md)."
        )


CHECKS: dict[str, Callable[[str, Any, Any], None]] = {
    "distances": check_distances,
    "blocks": check_blocks,
    "kinds": check_kinds,
    "deepstack": check_deepstack,
    "generate": check_generate,
}
"""Decoders in which a dropped token cannot mean by convention what it should: each raises TypeError, one sentence."""


def own_generate(model: Any, language: Any) -> bool:
    """Whether a model has a ``generate`` of its own beside one of the language model that it holds."""
    method = getattr(type(model), "generate", None)
    if method is None or method is GenerationMixin.generate:
        return False
    inner: list[Any] = [part for part in model.modules() if part is not model and isinstance(part, GenerationMixin)]
    return any(language in part.modules() for part in inner)


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The attention module of a decoder layer or a block of a tower; None if it is recurrent or has none."""
    named = (getattr(layer, name, None) for name in ATTENTION)
    parts = (part for part in (*named, *layer.children()) if isinstance(part, nn.Module))
    return next((part for part in parts if _attends(part)), None)


def _attends(module: nn.Module) -> bool:
    """Whether it projects queries and dispatches attention by its config."""
    kind = type(module).__name__.lower()
    if not hasattr(module, "config") or "cross" in kind or any(word in kind for word in RECURRENT):
        return False
    names = {name.lower() for name, _ in module.named_children()}
    return any(name in ("q", "query", "wq", "qkv") or name.startswith(("q_", "qkv", "wq", "query")) for name in names)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# -------------------------------------------------------------------------------------------------------------- items
def _grids(call: dict[str, Any]) -> Tensor | None:
    """(N, 3) time, height and width in patches of each item of a ``get_*_features`` call, if it names them."""
    for name, value in call.items():
        if "grid" in name and isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] in (2, 3):
            ones = value.new_ones(len(value), 3 - value.shape[1])
            return torch.cat([ones, value], 1).cpu()
    return None


def _layout(time: int, height: int, width: int, length: int) -> ItemLayout:
    """Views of one grid, of which as many patches per axis are a token as fit ``length``."""
    merge = round((time * height * width / length) ** 0.5) if length else 1
    rows, columns = height // max(merge, 1), width // max(merge, 1)
    if time * rows * columns == length:
        return equal_views(time, rows, columns)
    if rows * (columns + 1) + 2 == length:
        return _framed(rows, columns)
    return single_view(*squarest_grid(max(length, 1)))


@functools.lru_cache(maxsize=64)
def _of_size(height: int, width: int, length: int) -> ItemLayout:
    """One grid of square tokens that fills a picture of so many pixels, if there is one of that length."""
    cell = (height * width / length) ** 0.5 if length else 1
    rows, columns = round(height / cell), round(width / cell)
    if rows * columns != length or rows * width != columns * height:
        return single_view(*squarest_grid(max(length, 1)))
    return replace(single_view(rows, columns), size=(height, width))


@functools.lru_cache(maxsize=64)
@torch.inference_mode(mode=False)  # a cached tensor may be an index in a pass that keeps gradients
def _framed(rows: int, columns: int) -> ItemLayout:
    """One grid with a separator before it, one after each of its rows, and one behind it."""
    patch = torch.zeros(rows, columns + 1, dtype=torch.bool, device="cpu")
    patch[:, :-1] = True
    there = nn.functional.pad(patch.flatten(), (1, 1))
    index = (there.cumsum(0) - 1).clamp(min=0)
    row, column = (torch.where(there, place, 0) for place in (index // columns, index % columns))
    return ItemLayout(torch.where(there, 0, NEWLINE), row, column, ((rows, columns),))


def _fill(record: VisionRecord, counts: list[int], runs: list[int]) -> bool:
    """Whether the entries fill the rows of the batch, each within one run or, with a view for each, several."""
    ends = set(itertools.accumulate(runs, initial=0))
    rows = set(itertools.accumulate(counts, initial=0))
    places, first = set(), 0
    for length, layout in zip(record.lengths, record.layouts, strict=True):
        last = first + length
        if any(first < end < last for end in ends) and len(layout.grids) == 1:
            return False
        places.add(last)
        first = last
    return rows <= {0, *places}


# ---------------------------------------------------------------------------------------------------- per-token extras
_HANDLED = {"attention_mask", "position_ids", "inputs_embeds", "past_key_values", "input_ids", "use_cache"}
"""Arguments that the engine shortens itself."""


class _Cutter:
    """Shortens arguments of one call of a language model to the tokens ``index`` (B, n), ``valid`` (B, n).

    Rows of visual tokens (V, D) are told by a mask (B, S) of the same call that is True at V places.
    """

    def __init__(self, kwargs: dict[str, Any], index: Tensor, valid: Tensor) -> None:
        self.index, self.valid = index, valid
        self.batch, self.length = kwargs["inputs_embeds"].shape[:2]
        others = (value for name, value in kwargs.items() if name not in _HANDLED)
        found = (value for value in _tensors(others) if value.dtype == torch.bool and value.dim() == 2)
        self.masks = {int(mask.sum()): mask for mask in found if mask.shape == (self.batch, self.length)}

    def cut(self, value: Any) -> Any:
        """A tensor, or a nest of them, without what was dropped; anything else as it is."""
        if isinstance(value, Mapping):
            return {name: self.cut(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [self.cut(part) for part in value]
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        if value.shape[1] == self.length and value.shape[0] in (1, self.batch):
            short = gather(value, self.index)
            there = self.valid.view(*self.valid.shape, *[1] * (value.dim() - 2)).to(value.device)
            return short & there if value.dtype == torch.bool else short
        if value.dim() == 2 and len(value) in self.masks:
            return value[cut_rows(self.masks[len(value)], self.index, self.valid)[1].to(value.device)]
        return value


def _tensors(values: Any) -> Iterator[Tensor]:
    """All tensors in a nest of mappings and sequences."""
    for value in values.values() if isinstance(values, Mapping) else values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping | list | tuple):
            yield from _tensors(value)


def _padded(hooks: AdapterHooks) -> Callable[[Callable], Callable]:
    """A layer whose convolutions are told of the padding that a cut inside of the decoder made."""

    def make(original: Callable) -> Callable:
        def forward(*args: Any, conv_mask: Tensor | None = None, **kwargs: Any) -> Any:
            if (left := hooks.rows()) is not None:
                conv_mask = None if bool(left[1].all()) else left[1].to(args[0].device)
            return original(*args, conv_mask=conv_mask, **kwargs)

        return forward

    return make
