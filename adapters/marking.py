# SPDX-License-Identifier: Apache-2.0
"""Which patch of a vision tower becomes which visual token, found by marking patches and looking at the tokens.

The blocks of the tower are left out of one more encoding: they hand on what they are given, and one of them noise in
which patches can be marked. So what is measured is all that stands behind the blocks, whatever it is: windows undone,
pixel unshuffle, tiles, newlines, separate views. A mark shows as the derivative of tokens by a row of that noise, which
is zero, exactly, where there is no way from the patch to a token.

Tokens are told apart by code words: each derivative is that of the tokens whose word has a certain bit. Half of the
bits of each word are set, so that a patch which reaches two tokens shows more bits than a word has. 4,000 tokens need
15 derivatives of what stands behind the blocks. This file must not know any family, nor what is read of a tower.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.adapters.base import Adapter
from vtoken.engine.tower import feature_list

UNUSED = -1
WAY_OUT = "use a reducer that needs no encoder attention."


@dataclass(frozen=True)
class PatchMap:
    """The patches of each visual token.

    Parameters
    ----------
    token : Tensor
        (N,) long: the token that each row of the tower becomes a part of, `UNUSED` for rows that become none ([CLS],
        registers, padding).
    members : Tensor
        (T, k) long: rows of each token in their order, `UNUSED` behind the last; none for separators.
    """

    token: Tensor
    members: Tensor

    @classmethod
    def of(cls, token: Tensor, tokens: int) -> PatchMap:
        """The map of N rows to that many tokens."""
        used = (token >= 0).nonzero()[:, 0]
        rows = used[token[used].argsort(stable=True)]
        counts = torch.bincount(token[used], minlength=tokens)
        there = torch.arange(max(int(counts.max()), 1), device=token.device) < counts[:, None]
        members = torch.full(there.shape, UNUSED, device=token.device)
        members[there] = rows
        return cls(token, members)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the patches of each token: (N, C) to (T, C), NaN for tokens that are made of none."""
        members = self.members.to(values.device)
        there = (members >= 0)[..., None]
        found = torch.where(there, values[members.clamp(min=0)], 0)
        return found.sum(1) / there.sum(1)  # 0 / 0 where there is no patch


class Marker:
    """Measures `PatchMap` of one model, and keeps those of the shapes that were seen last.

    Parameters
    ----------
    adapter : Adapter
        Knows the blocks of the tower and the module that encodes.
    size : int
        Maps that are kept.
    """

    def __init__(self, adapter: Adapter, size: int = 64) -> None:
        self.adapter, self.size = adapter, size
        self.maps: dict[Any, PatchMap] = {}

    def map_of(self, modality: str, call: Mapping[str, Any], rows: int, behind: nn.Module | None = None) -> PatchMap:
        """The map of one call of ``get_*_features``.

        Parameters
        ----------
        modality : str
            ``"image"`` or ``"video"``.
        call : mapping
            The arguments of the call.
        rows : int
            Rows of all views, with leading tokens, in the block whose patches are meant. Towers that merge patches
            between their blocks have other numbers of them before and behind.
        behind : nn.Module or None
            One the rows of whose input are meant instead.

        Raises
        ------
        ValueError
            If no block has so many rows, if no derivative arrives, if patches become parts of several tokens, or if
            tokens that are not known as separators are made of none.
        """
        given = {name: value for name, value in call.items() if name != "kwargs"}
        key = (modality, rows, behind, _shape_of(given))
        if (found := self.maps.pop(key, None)) is None:
            found = self._measure(modality, given, rows, behind)
        self.maps[key] = found  # the one used last stands last
        while len(self.maps) > self.size:
            del self.maps[next(iter(self.maps))]
        return found

    def _measure(self, modality: str, given: dict[str, Any], rows: int, behind: nn.Module | None) -> PatchMap:
        with torch.inference_mode(mode=False):
            given = {name: _ordinary(value) for name, value in given.items()}
            marked = _Marked([] if behind is not None else list(self.adapter.tower_blocks), behind)
            if behind is None:
                with marked.open(), torch.no_grad():
                    self._encode(modality, given)
                marked.mark(self._chosen(marked.shapes, rows))
            with marked.open(), torch.enable_grad():
                entries = self._encode(modality, given)
            features = torch.cat(entries)
            found = PatchMap.of(self._decode(features, marked.leaves), len(features))
        lengths = self.adapter.item_lengths(entries, given)
        separator = torch.cat([layout.newline for layout in self.adapter.layouts(modality, given, lengths)])
        if bool(((found.members < 0).all(1).cpu() & ~separator.cpu()).any()):
            raise ValueError(
                f"{type(self.adapter.model).__name__} has visual tokens that no patch becomes a part of, where none "
                f"are known to stand between those of a picture: {WAY_OUT}"
            )
        return found

    def _encode(self, modality: str, given: dict[str, Any]) -> list[Tensor]:
        """(N, D) features of each entry of what the model returns."""
        encode = getattr(self.adapter.outer, f"get_{modality}_features")
        return feature_list(encode(**{**given, "return_dict": True}))

    def _chosen(self, shapes: list[list[torch.Size]], rows: int) -> set[int]:
        """Numbers of the blocks that work on so many rows."""
        found = {n for n, calls in enumerate(shapes) if sum(shape[:-1].numel() for shape in calls) == rows}
        if not found:
            raise ValueError(
                f"The attention of the vision tower of {type(self.adapter.model).__name__} works on {rows} rows, which "
                f"are not those of its blocks, so that what becomes of them cannot be measured: {WAY_OUT}"
            )
        return found

    def _decode(self, features: Tensor, leaves: list[Tensor]) -> Tensor:
        """(N,) long: the token of each row of the ``leaves``."""
        name = type(self.adapter.model).__name__
        if not features.requires_grad:
            raise ValueError(
                f"No derivative of the visual tokens of {name} by its patches exists, so that it cannot be measured "
                f"which patch becomes which token: {WAY_OUT}"
            )
        words = code_words(len(features)).to(features.device)
        noise = _noise(features)
        seen = []
        for bit in words.unbind(1):
            found = torch.autograd.grad(
                features, leaves, noise * bit[:, None], retain_graph=True, allow_unused=True, materialize_grads=True
            )
            seen.append(torch.cat([(part != 0).any(-1).flatten().to(features.device) for part in found]))
        token = read_words(torch.stack(seen, 1), words)
        if token is None:
            raise ValueError(
                f"{name} mixes patches behind the blocks of its vision tower (a resampler, an interpolation, or a "
                f"convolution that overlaps), so that no visual token is made of patches of its own: {WAY_OUT}"
            )
        return token


class MarkedAdapter(Adapter):
    """An adapter of a model of which nobody said what patch becomes which token."""

    @functools.cached_property
    def marker(self) -> Marker:
        """What measures it."""
        return Marker(self)

    def skipped_tokens(self, call: dict[str, Any]) -> int:
        return 0  # they are rows that become no token, as they show when they are marked

    def pack(self, parts: list[Tensor], modality: str, call: dict[str, Any]) -> Tensor:
        """Bring per-patch maps to token order, by what marks on patches change.

        Raises
        ------
        ValueError
            If visual tokens are not made of patches of their own.
        """
        rows = torch.cat([part.flatten(0, 1) for part in parts])
        found = self.marker.map_of(modality, call, len(rows))
        place = torch.cat([torch.arange(part.shape[1], device="cpu").repeat(len(part)) for part in parts])
        if bool((found.token[place < self.leading_tokens] != UNUSED).any()):
            raise ValueError(
                f"The vision tower of {type(self.model).__name__} has {self.leading_tokens} tokens that are no "
                "patches, but not before the patches, so that [CLS] cannot be told: it needs an adapter that says "
                "where they are (leading_tokens, docs/adding-a-family.md), or use a reducer that needs no encoder "
                "attention."
            )
        return found.mean(rows)

    def tower_groups(self, patches: int, modality: str) -> Tensor:
        raise ValueError(
            f"{type(self.model).__name__} is served by convention, which does not tell what patches of the vision "
            "tower can be left out together: use a reducer that acts before the language model."
        )

    @property
    def projector(self) -> nn.Module:
        """The module that turns encoder features into embeddings.

        Raises
        ------
        ValueError
            If it has no usual name.
        """
        try:
            return super().projector
        except TypeError:
            raise ValueError(
                f"The projector of {type(self.model).__name__} has no usual name, so that it cannot be told what it is "
                "given for a token: use a reducer that does not look at the projector's input (some take "
                "visual='projected')."
            ) from None

    def pack_projector_input(self, parts: list[Tensor], modality: str, call: dict[str, Any]) -> Tensor:
        """The row of each token, by what marks on rows change, where the projector is given one for each."""
        rows = torch.cat([part.flatten(0, -2) for part in parts])
        found = self.marker.map_of(modality, call, len(rows), self.projector)
        if found.members.shape[1] > 1:
            return super().pack_projector_input(parts, modality, call)
        return found.mean(rows)

    def resampled(self, modality: str, call: dict[str, Any], grids: list[tuple[int, int]]) -> dict[str, Any]:
        raise ValueError(
            f"{type(self.model).__name__} is served by convention, which does not tell how its pictures are made "
            "smaller: use the processor's own settings for that, or the reducer 'pooled'."
        )


class _Marked:
    """Blocks of a tower that hand on what they are given, or, if they are marked, noise in its place.

    Parameters
    ----------
    blocks : list of nn.Module
        The blocks, in their order.
    behind : nn.Module or None
        Another module, the input of which is noise too.
    """

    def __init__(self, blocks: list[nn.Module], behind: nn.Module | None) -> None:
        self.blocks, self.behind = blocks, behind
        self.shapes: list[list[torch.Size]] = [[] for _ in blocks]
        """Per block, the shapes of the hidden states of its calls."""
        self.leaves: list[Tensor] = []
        """The noise, one tensor for each call of a marked module: what comes before it does not matter."""
        self._marked: set[int] = set()
        self._further: dict[type, Any] = {}
        """What blocks of a class return beside hidden states; None if they return no tuple."""

    def mark(self, chosen: set[int]) -> None:
        """Let the ``chosen`` blocks return noise, the same in all of them, from the next opening on."""
        self._marked, self.leaves = chosen, []
        self.shapes = [[] for _ in self.blocks]

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """While open, the modules are replaced."""
        with contextlib.ExitStack() as stack:
            if self.behind is not None:
                stack.callback(self.behind.register_forward_pre_hook(self._before).remove)
            for number, block in enumerate(self.blocks):
                forward, own = block.forward, vars(block).get("forward")
                stack.callback(functools.partial(_restore, block, own, block.training))
                block.forward = functools.partial(self._forward, number, forward)
                block.training = False  # no checkpointing
            yield

    def _forward(self, number: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else next(iter(kwargs.values()))
        kind = type(self.blocks[number])
        if kind not in self._further:
            with torch.no_grad():
                output = forward(*args, **kwargs)
            self._further[kind] = output[1:] if isinstance(output, tuple) else None
        call = len(self.shapes[number])
        self.shapes[number].append(hidden.shape)
        if number in self._marked:
            hidden = self._leaf(call, hidden)
        further = self._further[kind]
        return hidden if further is None else (hidden, *further)

    def _before(self, module: nn.Module, args: tuple) -> tuple:
        return self._leaf(len(self.leaves), args[0]), *args[1:]

    def _leaf(self, call: int, hidden: Tensor) -> Tensor:
        if call == len(self.leaves):
            self.leaves.append(_noise(hidden).requires_grad_())
        return self.leaves[call].clone()  # what follows may write into it


def _restore(block: nn.Module, forward: Any, training: bool) -> None:
    block.training = training
    if forward is None:
        del block.forward
    else:
        block.forward = forward


def _noise(like: Tensor) -> Tensor:
    """Normal numbers of the shape of a tensor, the same ones every time."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randn(like.shape, generator=generator, device="cpu", dtype=torch.float32).to(like)


@functools.lru_cache(maxsize=64)
def code_words(count: int) -> Tensor:
    """(count, m) bool: different words of as few bits as possible, in each of which half, rounded up, are set.

    No word holds another, and two together have more bits than one.
    """
    bits = next(m for m in itertools.count(1) if math.comb(m, (m + 1) // 2) >= count)
    found = itertools.islice(itertools.combinations(range(bits), (bits + 1) // 2), count)
    words = torch.zeros(count, bits, dtype=torch.bool, device="cpu")
    if count:
        words.scatter_(1, torch.tensor(list(found), device="cpu"), True)
    return words


def read_words(seen: Tensor, words: Tensor) -> Tensor | None:
    """The number of the word that each row shows.

    Parameters
    ----------
    seen : Tensor
        (N, m) bool: bits that were seen.
    words : Tensor
        (T, m) bool: as `code_words` gives them.

    Returns
    -------
    Tensor or None
        (N,) long, `UNUSED` for rows that show nothing; None if a row shows something that is no word.
    """
    weight = 2 ** torch.arange(words.shape[1], device=words.device)
    sums = (words * weight).sum(1)
    order = sums.argsort()
    shown = (seen * weight).sum(1)
    place = torch.searchsorted(sums[order], shown).clamp(max=len(words) - 1)
    number = order[place]
    known = sums[number] == shown
    if not bool((known | (shown == 0)).all()):
        return None
    return torch.where(known, number, UNUSED)


def _ordinary(value: Any) -> Any:
    """A tensor that may be part of a graph also where the caller is in inference mode."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    return type(value)(map(_ordinary, value)) if type(value) in (list, tuple) else value


def _shape_of(value: Any) -> Any:
    """What a map depends on, hashable: all that a call says but the values of pictures."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            return tuple(value.shape)
        return tuple(value.shape), hashlib.sha256(value.contiguous().cpu().numpy().tobytes()).digest()
    if isinstance(value, Mapping):
        return tuple((name, _shape_of(part)) for name, part in sorted(value.items()))
    if isinstance(value, list | tuple):
        return tuple(map(_shape_of, value))
    return value if isinstance(value, Hashable) else object()  # equal to nothing
