# SPDX-License-Identifier: Apache-2.0
"""What the session must know about a model family. The base class covers most of transformers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vtoken.adapters import towers
from vtoken.compat import CACHE
from vtoken.context import NEWLINE, ItemLayout
from vtoken.engine.taps import Reader, tap

if TYPE_CHECKING:
    from vtoken.engine.hooks import AdapterHooks
    from vtoken.engine.tower import VisionRecord

IMAGE, VIDEO = 1, 2
MODALITIES = {"image": IMAGE, "video": VIDEO}
BETWEEN, KEPT_POSITIONS, HIDING, READING = "between layers", "positions='keep'", "backend='mask'", "decoder attention"
SHORTENING = "vtoken.shorten"
"""Halves of the work that a family may be unable to do, see `Adapter.limits`."""


class Adapter:
    """Where things are in one model; nothing about methods.

    Parameters
    ----------
    model : nn.Module
        The model that the user calls ``generate`` on.

    Raises
    ------
    TypeError
        If parts of the model are missing.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    """``config.model_type`` values the family serves."""
    pixel_keys: tuple[str, ...] = ("pixel_values", "pixel_values_videos", "pixel_values_images")
    recounts: ClassVar[bool] = False
    """Whether windows and distances are counted over the tokens that are left, as in a shorter prompt."""
    kind_names: ClassVar[Mapping[str, str]] = {}
    """Kinds of decoder layers by the name that the config has for them, where that is not transformers' usual one."""
    limits: ClassVar[Mapping[str, str]] = {}
    """What is not served, `BETWEEN`, `KEPT_POSITIONS`, `HIDING`, `READING` or `SHORTENING`, and why, as a clause."""
    outer_takes: ClassVar[tuple[str, ...]] = ("attention_mask", CACHE)
    """Arguments that the outer module must take, as the engine reads or replaces them."""
    attention_norm: ClassVar[str] = "input_layernorm"
    """Name of the norm before the attention of a decoder layer."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.generator: Any = model
        outer: Any = getattr(model, "base_model", model)  # the model itself, if it is one without a head
        self.outer: Any = outer
        self.language_model: Any = self._part("language model", ("language_model", "text_model"), outer)
        self.layers: Any = self._part("decoder layers", ("layers",), self.language_model)
        self.placeholders = {code: self._placeholder(name) for name, code in MODALITIES.items()}

    def _placeholder(self, modality: str) -> int | None:
        config = self.model.config
        names = (f"{modality}_token_id", f"{modality}_token_index")
        return next((found for name in names if (found := getattr(config, name, None)) is not None), None)

    def _part(self, what: str, names: tuple[str, ...], *places: Any) -> Any:
        """The first module under one of the names."""
        found = (part for place in places for name in names if (part := getattr(place, name, None)) is not None)
        if (part := next(found, None)) is None or (isinstance(part, nn.ModuleList) and not len(part)):
            raise TypeError(
                f"{type(self.model).__name__} has no {what} ({', '.join(names)} of {type(places[0]).__name__}), which "
                "every model of its type has: load the whole model, not parts of it."
            )
        return part

    def check_parts(self) -> None:
        """Refuse a model without a vision tower.

        Raises
        ------
        TypeError
            One sentence that says what is missing.
        """
        _ = self.tower

    def modality(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """(B, S) long: 0 text, 1 image, 2 video."""
        given: Any = input_ids if input_ids is not None else inputs_embeds
        out = torch.zeros(given.shape[:2], dtype=torch.long, device=given.device)
        for code, token in self.placeholders.items():
            if token is None:
                continue
            if input_ids is not None:
                here = input_ids == token
            else:
                row = self.model.get_input_embeddings()(torch.tensor(token, device=given.device))
                here = (given == row).all(-1)
            out = torch.where(here, code, out)
        return out

    def modality_in(self, call: Mapping[str, Any]) -> Tensor:
        """`modality` of the arguments of a call of the outer module."""
        return self.modality(call.get("input_ids"), call.get("inputs_embeds"))

    def attention(self, layer: Any) -> nn.Module:
        """The attention module of a decoder layer."""
        return layer.self_attn

    def has_attention(self, layer: Any) -> bool:
        """Whether a decoder layer attends; recurrent layers do not."""
        return hasattr(layer, "self_attn")

    def kv_source(self, layer: int) -> int:
        """Number of the decoder layer that made or chose the keys of ``layer``: its own, unless layers share them."""
        return layer

    def query_projections(self, layer: Any) -> list[nn.Module]:
        """The row-wise modules of a decoder layer's attention that a row needs only if it attends itself."""
        block = self.attention(layer)
        return [getattr(block, name) for name in ("q_proj", "o_proj") if hasattr(block, name)]

    def ffn(self, layer: Any) -> nn.Module:
        """The feed-forward network of a decoder layer.

        Raises
        ------
        NotImplementedError
            If the layer has none that is a module of its own.
        """
        if not isinstance(found := getattr(layer, "mlp", None), nn.Module):
            raise NotImplementedError(
                f"{type(layer).__name__} has no feed-forward network under the name mlp: use a reducer that drops "
                "tokens, or one that leaves the feed-forward networks alone."
            )
        return found

    def narrow_ffn(self, layer: Any, share: float) -> dict[str, Tensor]:
        """Parameters, by name, that leave the leading ``share`` of the neurons of a decoder layer's `ffn`.

        Raises
        ------
        NotImplementedError
            If the network is no gated one of three plain linear layers (a mixture of experts, quantised weights).
        """
        ffn = self.ffn(layer)
        names = ("gate_proj", "up_proj", "down_proj")
        parts = {name: getattr(ffn, name, None) for name in names}
        linear = {name: part for name, part in parts.items() if type(part) is nn.Linear and not part.weight.is_meta}
        if len(linear) < len(names):
            raise NotImplementedError(
                f"{type(ffn).__name__} has no neurons in plain linear layers (gate_proj, up_proj, down_proj), so that "
                f"ffn={share} is not defined for it: give ffn=0 or ffn=1."
            )
        down = linear["down_proj"]
        neurons = max(1, round(share * down.in_features))
        narrow = {"down_proj.weight": down.weight[:, :neurons]}
        for name in ("gate_proj", "up_proj"):
            for kind, values in linear[name].named_parameters():
                narrow[f"{name}.{kind}"] = values[:neurons]
        return narrow

    def cut_extras(self, kwargs: dict[str, Any], index: Tensor, valid: Tensor) -> dict[str, Any]:
        """Shorten further per-token arguments of the language model's call (deepstack features).

        Parameters
        ----------
        kwargs : dict
            The arguments of the whole call; the engine shortens embeddings, masks and positions itself.
        index, valid : Tensor
            (B, n): the tokens that stay, and which of them are no padding; see `vtoken.ops.ragged.compact`.
        """
        return kwargs

    def shown(self, kwargs: dict[str, Any]) -> Tensor:
        """(B, S, D) what reducers see of the tokens before the decoder, given the language model's arguments."""
        embeds: Tensor = kwargs["inputs_embeds"]
        return embeds

    def with_shown(self, kwargs: dict[str, Any], states: Tensor) -> dict[str, Any]:
        """The language model's arguments in which the tokens are what ``states`` (B, S, D) say, see `shown`."""
        return {**kwargs, "inputs_embeds": states}

    def install(self, hooks: AdapterHooks) -> None:
        """Further instance-level wraps (``hooks.replace``), undone when the model is unwrapped."""

    @property
    def tower(self) -> Any:
        """The vision encoder."""
        return self._part("vision tower", ("vision_tower", "visual", "vision_model"), self.outer)

    @property
    def projector(self) -> nn.Module:
        """The module that turns encoder features into language-model embeddings."""
        return self._part("projector", ("multi_modal_projector", "connector", "merger"), self.outer, self.tower)

    @property
    def token_projector(self) -> nn.Module:
        """The projector on one row per token, as `pack_projector_input` makes them: (T, C) to (T, D)."""
        return self.projector

    @property
    def tower_blocks(self) -> nn.ModuleList:
        """The blocks of the tower: the longest list of modules in it."""
        return max((m for m in self.tower.modules() if isinstance(m, nn.ModuleList)), key=len)

    @functools.cached_property
    def leading_tokens(self) -> int:
        """Tokens of the tower before the first patch: 1 for [CLS], more with registers."""
        return towers.leading_tokens(self.tower)

    def skipped_tokens(self, call: dict[str, Any]) -> int:
        """Tokens of the tower, from the first one on, that become no visual tokens: those before the patches.

        Parameters
        ----------
        call : dict
            The arguments of the ``get_*_features`` call.
        """
        return self.leading_tokens

    @functools.cached_property
    def global_blocks(self) -> tuple[int, ...]:
        """Numbers of the blocks of the tower in which a patch attends to its whole picture, not to a window of it."""
        return towers.global_blocks(self.tower, self.tower_blocks)

    def read_block(self, layer: int | float) -> int:
        """Number of the block at which a statistic of ``layer`` is read: one that attends to the whole picture.

        In a window every patch competes with its neighbours only, and what a window receives in sum is fixed: patches
        of two windows cannot be compared. So a negative index, or a share of the depth, means the nearest global block
        at or before it, or the first one if there is none before.

        Parameters
        ----------
        layer : int or float
            As `tower_block` takes it.

        Raises
        ------
        ValueError
            If there is no such block, if it is asked for by its number and attends in windows, or if all do.
        """
        number, whole = self.tower_block(layer), self.global_blocks
        if number in whole:
            return number
        if not whole:
            raise ValueError(
                f"All {len(self.tower_blocks)} blocks of the vision tower attend in windows, so that no statistic "
                "compares patches of the whole picture: use a reducer that needs no encoder attention."
            )
        if isinstance(layer, int) and layer >= 0:
            raise ValueError(
                f"Block {layer} of the vision tower attends in windows, in which patches compete with their neighbours "
                f"only: read one that attends to the whole picture ({', '.join(map(str, whole))})."
            )
        return max((block for block in whole if block < number), default=whole[0])

    def tower_block(self, layer: int | float) -> int:
        """Number of the block that an index, also a negative one, or a share of the depth (float) means."""
        depth = len(self.tower_blocks)
        number = int(layer * depth) if isinstance(layer, float) else layer
        if not -depth <= number < depth:
            raise ValueError(f"The vision tower has {depth} blocks, so layer {layer} does not exist.")
        return number % depth

    def vision_attention(self, layer: int | float) -> nn.Module:
        """The attention module of a block of the tower."""
        block = self.tower_blocks[self.tower_block(layer)]
        return next(getattr(block, name) for name in ("self_attn", "attn", "attention") if hasattr(block, name))

    def tap_tower(self, layer: int, reader: Reader) -> AbstractContextManager[None]:
        """While open, ``reader`` sees the queries and keys of a block of the tower."""
        return tap(self.vision_attention(layer), reader)

    def tower_groups(self, patches: int, modality: str) -> Tensor:
        """Which patches of a view, as its blocks see them, become one token and so can only be dropped together.

        Parameters
        ----------
        patches : int
            Patches of a view, without leading tokens.
        modality : str
            ``"image"`` or ``"video"``.

        Returns
        -------
        Tensor
            (patches,) long: numbers from 0, each as often as any other.

        Raises
        ------
        ValueError
            If patches cannot be dropped inside of this tower.
        """
        raise ValueError(
            f"The vision tower of {type(self.model).__name__} computes pictures of several sizes, or several windows, "
            "in one sequence, in which no patches can be dropped: use a reducer that acts before the language model."
        )

    @property
    def tower_embedding(self) -> nn.Module:
        """The module of the tower that embeds patches, one row of pixels each."""
        return self.tower.patch_embed

    @property
    def tower_mergers(self) -> list[nn.Module]:
        """Modules of the tower that make one row of the rows of all patches of a token.

        Raises
        ------
        ValueError
            If patches cannot be kept out of this tower.
        """
        raise ValueError(
            f"The vision tower of {type(self.model).__name__} is not known to compute the patches of all pictures in "
            "one sequence, from which some can be left out beforehand: use a reducer that drops them inside of the "
            "tower, or before the language model."
        )

    def tower_pictures(self, args: tuple, kwargs: dict[str, Any], std: tuple[float, ...] | None) -> list[Tensor]:
        """Pixels that the tower is called with, (T, h, w, D) for each picture: one row for each token.

        Parameters
        ----------
        args, kwargs
            Of the call of the tower.
        std : tuple of float or None
            ``image_std`` of the processor; that of the family's released ones if None.
        """
        raise NotImplementedError

    @property
    def merge(self) -> int:
        """Patches per token and axis, of a tower with a sequence of all pictures."""
        raise NotImplementedError

    def tower_order(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """(T,) long: the token whose patches stand at each place of the tower's sequence, which may be windows."""
        raise NotImplementedError

    def tower_items(self, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> list[int]:
        """Rows of each picture, clip or view in the states that a block is given, in their order.

        Parameters
        ----------
        hidden : Tensor
            (V, n, C) states of V views, or (L, C) of a packed sequence.
        args, kwargs
            Of the call of the tower.

        Raises
        ------
        ValueError
            If it is not known how the rows belong to pictures.
        """
        if type(self).tower_groups is Adapter.tower_groups or hidden.dim() != 3:
            raise ValueError(
                f"It is not known which rows of the vision tower of {type(self.model).__name__} belong to which "
                "picture, so that none can be dropped: use a reducer that acts before the language model."
            )
        return [hidden.shape[1]] * len(hidden)

    def cut_block(self, args: tuple, kwargs: dict[str, Any], kept: Tensor) -> dict[str, Any]:
        """Shorten what a block of the tower is given by name beside its states to the rows ``kept`` (L,) bool.

        Raises
        ------
        ValueError
            If there is something of which it is not known how.
        """
        given = (
            x for value in (*args[1:], *kwargs.values()) for x in (value if isinstance(value, tuple) else (value,))
        )
        if any(isinstance(x, Tensor) for x in given):
            raise ValueError(
                f"The vision tower of {type(self.model).__name__} hands its blocks more than hidden states, such as "
                "masks or rotary tables, which cannot be cut along: use a reducer that acts before the language model."
            )
        return kwargs

    @property
    def tower_exits(self) -> tuple[int, ...]:
        """Numbers of the blocks of the tower whose output leaves it: the last one, and those that give features."""
        depth, config = len(self.tower_blocks), self.model.config
        named = [getattr(config, name, None) for name in ("vision_feature_layer", "vision_feature_layers")]
        layers = [x for value in named for x in (value if isinstance(value, (list, tuple)) else [value])]
        outputs = {(layer if layer >= 0 else depth + 1 + layer) - 1 for layer in layers if isinstance(layer, int)}
        return tuple(sorted(outputs | {depth - 1}))

    def tower_ffn(self, block: nn.Module) -> nn.Module:
        """The feed-forward network of a block of the tower.

        Raises
        ------
        ValueError
            If it has none under a usual name.
        """
        found = next((getattr(block, name) for name in ("mlp", "ffn", "feed_forward") if hasattr(block, name)), None)
        if found is None:
            raise ValueError(
                f"{type(block).__name__} has no feed-forward network under a usual name, so that patches cannot skip "
                "it: use stabilised=0."
            )
        return found

    def pack(self, parts: list[Tensor], modality: str, call: dict[str, Any]) -> Tensor:
        """Bring per-patch maps to token order.

        Parameters
        ----------
        parts : list of Tensor
            (views, patches, C) each, as the tower computed them, without the `skipped_tokens`.
        modality : str
            ``"image"`` or ``"video"``.
        call : dict
            The arguments of the ``get_*_features`` call.

        Returns
        -------
        Tensor
            (T, C) in the order of the model's features, NaN for separators.
        """
        raise ValueError(
            f"{type(self.model).__name__} has no mapping from encoder patches to tokens: "
            "use a reducer that needs no encoder attention."
        )

    def pack_projector_input(self, parts: list[Tensor], modality: str, call: dict[str, Any]) -> Tensor:
        """Bring the rows that the projector was given, one tensor per call of it, to one row (T, C) per token."""
        raise ValueError(
            f"The projector of {type(self.model).__name__} merges patches, so that a token has no input of its own: "
            "use a reducer that does not look at the projector's input (some take visual='projected')."
        )

    def item_lengths(self, features: list[Tensor], call: dict[str, Any]) -> list[int]:
        """Tokens of each item, given the entries (N, D) and the arguments of ``get_*_features``."""
        return [len(entry) for entry in features]

    def regroup(self, record: VisionRecord, here: Tensor) -> VisionRecord:
        """Join items that belong to one picture, where only the prompt tells; ``here`` (B, S) marks placeholders."""
        return record

    def layouts(self, modality: str, call: dict[str, Any], lengths: list[int]) -> list[ItemLayout]:
        """The layout of each item; by default one view whose grid is the most square one that fits."""
        return [single_view(*squarest_grid(length)) for length in lengths]

    def shares(self, layout: ItemLayout, size: tuple[int, int] | None) -> Tensor:
        """(N, 4) part of a picture of (height, width) ``size`` that each token shows; see `ItemLayout.box`."""
        if layout.box is not None:
            return layout.box()
        rows, columns = torch.tensor(layout.grids, device="cpu")[layout.view.clamp(min=0)].unbind(1)
        return grid_shares(layout.row, layout.column, rows, columns)

    def resampled(self, modality: str, call: dict[str, Any], grids: list[tuple[int, int]]) -> dict[str, Any]:
        """Arguments of the ``get_*_features`` ``call`` for the same pictures, resized so that each gives such a grid.

        Parameters
        ----------
        grids : list of (rows, columns)
            Tokens of each picture.

        Raises
        ------
        ValueError
            If the family fixes the size of its views.
        """
        raise ValueError(
            f"{type(self.model).__name__} cuts pictures into views of a fixed size, which cannot be encoded smaller: "
            "use the processor's own settings for that (max_patches, image_grid_pinpoints), or the reducer 'pooled'."
        )

    def pixels(self, layout: ItemLayout) -> tuple[int, int] | None:
        """(height, width) of the picture as the processor handed it over, for one whose original size is unknown."""
        return None


def resize(pictures: Tensor, height: int, width: int) -> Tensor:
    """Pictures (N, C, H, W) at another size, as image processors make them smaller: bicubic, with antialiasing."""
    return interpolate(pictures.float(), (height, width), mode="bicubic", antialias=True).to(pictures.dtype)


def grid_shares(row: Tensor, column: Tensor, rows: Tensor | int, columns: Tensor | int) -> Tensor:
    """(N, 4) shares x0, y0, x1, y1 of the cells of a grid."""
    column, row = column.float(), row.float()
    return torch.stack([column / columns, row / rows, (column + 1) / columns, (row + 1) / rows], 1)


def squarest_grid(length: int) -> tuple[int, int]:
    """(rows, columns) with rows * columns == length, as square as possible, no more rows than columns."""
    rows = next(r for r in range(int(length**0.5), 0, -1) if length % r == 0)
    return rows, length // rows


def single_view(rows: int, columns: int) -> ItemLayout:
    """One full grid in raster order."""
    return equal_views(1, rows, columns)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(mode=False)  # a cached tensor may be an index in a pass that keeps gradients
def equal_views(views: int, rows: int, columns: int, newlines: int = 0) -> ItemLayout:
    """Several full grids of one shape, one after the other (frames, tiles), then ``newlines`` separators."""
    index = torch.arange(views * rows * columns, device="cpu")
    end = torch.zeros(newlines, dtype=torch.long, device="cpu")
    return ItemLayout(
        view=torch.cat([index // (rows * columns), end + NEWLINE]),
        row=torch.cat([index // columns % rows, end]),
        column=torch.cat([index % columns, end]),
        grids=((rows, columns),) * views,
    )


def square_groups(patches: int, size: int) -> Tensor:
    """(patches,) long: number of the size x size square, in raster order, of each patch of a square grid."""
    side = square_side(patches)
    index = torch.arange(patches, device="cpu")
    return index // side // size * (side // size) + index % side // size


def square_side(length: int) -> int:
    """Side of a square grid with ``length`` cells.

    Raises
    ------
    ValueError
        If there is no such grid.
    """
    side = round(length**0.5)
    if side * side != length:
        raise ValueError(f"{length} tokens do not form the square grid that this family is known to use.")
    return side
