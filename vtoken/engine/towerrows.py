# SPDX-License-Identifier: Apache-2.0
"""Rows that blocks of the vision tower do not compute: patches that never enter it, and patches that come back.

Both cut the sequence that the blocks work on and hand out tensors of full length, so that windows are put in order,
hidden states recorded and patches merged as ever. `EntryCut` keeps patches out of the whole tower, projector included;
their tokens are dropped from the prompt. `ReturnCut` leaves them out of the later blocks and rebuilds them; no token is
dropped. What a block is given beside its states, and where patches stand, is the adapter's knowledge; which patches
stay is the reducer's.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtoken import compat
from vtoken.ops.neighbours import neighbour_mean
from vtoken.precision import without_autocast

if TYPE_CHECKING:
    from vtoken.adapters.base import Adapter
    from vtoken.context import Thinned
    from vtoken.reducers.base import Reducer


class RowCut:
    """Rows of the tower's blocks, during one call of ``get_*_features``.

    Parameters
    ----------
    adapter : Adapter
        Knows the blocks and the order of their rows.
    reducer : Reducer
        Chooses.
    """

    def __init__(self, adapter: Adapter, reducer: Reducer) -> None:
        self.adapter, self.reducer = adapter, reducer
        self.block = 0
        self.kept: list[Tensor] = []
        """(1, L) bool per call of the tower; empty where no token is dropped."""
        self.patches: tuple[int, int] | None = None
        """Patches of all pictures, and those that the later blocks compute."""
        self._call: tuple[tuple, dict[str, Any]] = ((), {})
        self._rows: Tensor | None = None  # long, in the order of the blocks; None where all are computed
        self._memo: dict[tuple[int, ...], dict[str, Any]] = {}  # by the values given: a tower shares them among blocks
        self._full = self._short = torch.empty(0, dtype=torch.float32, device="cpu")

    def open(self, stack: contextlib.ExitStack) -> None:
        """Install the hooks until the stack closes."""
        self._hook(stack, self.adapter.tower, before=self._begin)
        for number, block in enumerate(self.adapter.tower_blocks):
            if number >= self.block:
                self._hook(stack, block, self._enter(number), self._leave(number))

    @staticmethod
    def _hook(stack: contextlib.ExitStack, module: nn.Module, before: Any = None, after: Any = None) -> None:
        if before is not None:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        if after is not None:  # prepend: transformers records hidden states by hooks of its own, which see full length
            stack.callback(module.register_forward_hook(after, prepend=True).remove)

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A call of the tower."""
        self._call, self._rows, self._memo = (args, kwargs), None, {}

    def _enter(self, number: int) -> Callable:
        """A hook before a block."""

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            compat.check_checkpointing(module, "vision tower")
            if not self._cuts(number, args[0]):
                return None
            return (self._shortened(args[0]), *args[1:]), self._cut_block(args, kwargs, args[0].shape)

        return enter

    def _leave(self, number: int) -> Callable:
        """A hook behind a block."""

        def leave(module: nn.Module, args: tuple, output: Any) -> Any:
            if self._rows is None:
                return None
            found = output[0] if isinstance(output, tuple) else output
            self._full = self._restored(number, found)
            return (self._full, *output[1:]) if isinstance(output, tuple) else self._full

        return leave

    @abstractmethod
    def _cuts(self, number: int, hidden: Tensor) -> bool:
        """Whether a block computes fewer rows than it is given."""

    @abstractmethod
    def _restored(self, number: int, found: Tensor) -> Tensor:
        """The full length of what a block computed; notes the computed rows in ``_short``."""

    @abstractmethod
    def widen(self, found: list[Tensor]) -> list[Tensor]:
        """Statistics of a later block, per call of its attention, at full length."""

    def _shortened(self, hidden: Tensor) -> Tensor:
        """The computed rows of states of full length, in their shape."""
        return self._short if hidden is self._full else self._rows_of(hidden)

    def _rows_of(self, hidden: Tensor) -> Tensor:
        short = hidden.flatten(0, -2)[self._computed]
        return short if hidden.dim() == 2 else short.view(len(hidden), -1, hidden.shape[-1])

    @property
    def _computed(self) -> Tensor:
        assert self._rows is not None, "asked only where rows are left out"
        return self._rows

    def _cut_block(self, args: tuple, kwargs: dict[str, Any], shape: torch.Size) -> dict[str, Any]:
        key = tuple(id(value) for value in kwargs.values())
        if key not in self._memo:
            kept = torch.zeros(shape[:-1].numel(), dtype=torch.bool, device=self._computed.device)
            kept[self._computed] = True
            self._memo[key] = {**self.adapter.cut_block(args, kwargs, kept), "_given": kwargs}  # so that ids stay taken
        return {name: value for name, value in self._memo[key].items() if name != "_given"}


class EntryCut(RowCut):
    """Patches that never enter the tower, as `Reducer.before_tower` says."""

    def open(self, stack: contextlib.ExitStack) -> None:
        mergers = self.adapter.tower_mergers  # raises where patches cannot be left out
        super().open(stack)
        self._hook(stack, self.adapter.tower_embedding, self._embed, self._embedded)
        for merger in mergers:
            self._hook(stack, merger, self._merge, self._merged)

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        super()._begin(module, args, kwargs)
        pictures = self.adapter.tower_pictures(args, kwargs, self.reducer.pixel_std)
        device, sources, start = pictures[0].device, [], 0
        with torch.no_grad(), without_autocast(device):
            for picture in pictures:
                sources.append(self.reducer.before_tower(picture).to(device) + start)
                start += picture.shape[:3].numel()
        self._place(torch.cat(sources), self.adapter.tower_order(args, kwargs))

    def _place(self, source: Tensor, order: Tensor) -> None:
        """Find the rows in both orders: of the pixels, and of the blocks."""
        own = torch.arange(len(source), device=source.device)
        stays = source == own
        inside = stays[order]  # in the order of the blocks
        size = self.adapter.merge**2
        self.kept.append(inside.repeat_interleave(size)[None])
        self.patches = (len(source) * size, int(inside.sum()) * size)
        if self.patches[0] == self.patches[1]:
            return
        rank = stays.cumsum(0) - 1
        self._pixels, self._pixel_of = _patches(own[stays], size), _patches(rank[source], size)
        place = torch.empty_like(own).scatter_(0, order, own)
        rank = inside.cumsum(0) - 1
        self._token_of = rank[place[source[order]]]
        self._rows, self._row_of = _patches(own[inside], size), _patches(self._token_of, size)

    def _embed(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        return None if self._rows is None else ((args[0][self._pixels], *args[1:]), kwargs)

    def _embedded(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        return None if self._rows is None else output[self._pixel_of]

    def _merge(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        return None if self._rows is None else ((self._shortened(args[0]), *args[1:]), kwargs)

    def _merged(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        return None if self._rows is None else output[self._token_of]

    def _cuts(self, number: int, hidden: Tensor) -> bool:
        return self._rows is not None

    def _restored(self, number: int, found: Tensor) -> Tensor:
        self._short = found
        return found[self._row_of]

    def widen(self, found: list[Tensor]) -> list[Tensor]:
        if self._rows is None:
            return found
        values, kept = torch.cat(found, 1)[0], self.kept[-1]
        out = values.new_zeros(*kept.shape, *values.shape[1:])
        out[kept] = values
        return [out]


class ReturnCut(RowCut):
    """Patches that leave the tower at a block and are rebuilt, as `Reducer.thin_tower` says.

    Raises
    ------
    ValueError
        If the reducer names a block that has no block before it.
    """

    def __init__(self, adapter: Adapter, reducer: Reducer) -> None:
        super().__init__(adapter, reducer)
        self.first, named = adapter.leading_tokens, reducer.tower_block()
        self.block = max(adapter.tower_block(named), int(isinstance(named, float)))  # a share is at least block 1
        if self.block < 1:
            raise ValueError(
                f"Reducer {reducer.name!r} cuts before block {named} of the vision tower, which is its first: nothing "
                f"has changed yet, so name one of 1 to {len(adapter.tower_blocks) - 1}."
            )
        self._exits = adapter.tower_exits
        self._before = self._start = torch.empty(0, dtype=torch.float32, device="cpu")
        self._gone = torch.empty(0, dtype=torch.long, device="cpu")
        whole, depth = reducer.tower_whole(), len(adapter.tower_blocks)
        self._whole = self.block + (int(whole * depth) if isinstance(whole, float) else whole)
        """The first block that attends to kept rows alone."""
        self._parts: list[Thinned] = []
        self._counts: list[int] = []

    def open(self, stack: contextlib.ExitStack) -> None:
        self._hook(stack, self.adapter.tower_blocks[self.block - 1], before=self._note)
        super().open(stack)
        for block in self.adapter.tower_blocks[self.block : self._whole]:
            self._check_recomputed(block)
            self._hook(stack, self.adapter.tower_ffn(block), self._feed, self._fed)

    def _note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._before = args[0].detach()

    def _cuts(self, number: int, hidden: Tensor) -> bool:
        if number == self.block:
            self._choose(hidden)
        return self._rows is not None and number >= self._whole

    def _choose(self, hidden: Tensor) -> None:
        self._rows, self._memo = None, {}
        lengths = self.adapter.tower_items(hidden, *self._call)
        states, before = (x.detach().flatten(0, -2).split(lengths) for x in (hidden, self._before))
        self._before = self._before[:0]
        with torch.no_grad(), without_autocast(hidden.device):
            pairs = zip(states, before, strict=True)
            self._parts = [self.reducer.thin_tower(now[self.first :], then[self.first :]) for now, then in pairs]
        kept, gone, start = [], [], 0
        for length, part in zip(lengths, self._parts, strict=True):
            stays = torch.ones(length, dtype=torch.bool, device=hidden.device)
            stays[self.first :] = False
            stays[self.first + part.keep] = True
            kept.append(stays.nonzero()[:, 0] + start)
            gone.append((~stays).nonzero()[:, 0] + start)
            start += length
        self._counts = [len(rows) for rows in kept]
        leading = self.first * len(lengths)
        every, computed = self.patches or (0, 0)
        self.patches = (every + start - leading, computed + sum(self._counts) - leading)
        if start == sum(self._counts):
            return
        self._rows, self._gone, self._start = torch.cat(kept), torch.cat(gone), hidden.flatten(0, -2)
        self._full, self._short = hidden, self._rows_of(hidden)

    def _feed(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        return None if self._rows is None else ((self._rows_of(args[0]), *args[1:]), kwargs)

    def _fed(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if self._rows is None:
            return None
        out = output.new_zeros(len(self._start), output.shape[-1])
        return out.index_copy(0, self._computed, output.flatten(0, -2)).view(*self._full.shape[:-1], -1)

    def _restored(self, number: int, found: Tensor) -> Tensor:
        self._short = self._rows_of(found) if number < self._whole else found
        flat = self._start.index_copy(0, self._computed, self._short.flatten(0, -2))
        if number < self._whole - 1 or number in self._exits:
            flat = flat.index_copy(0, self._gone, self._rebuilt())
        return flat.view_as(self._full)

    def _rebuilt(self) -> Tensor:
        """(R, C): states of the dropped rows now: what they were, and the mean change of their neighbours."""
        moved = (self._short.flatten(0, -2) - self._start[self._computed]).split(self._counts)
        return self._start[self._gone] + self._spread(moved)

    def _spread(self, values: Any) -> Tensor:
        """Means over the neighbours of each dropped row, of values of the kept rows of each picture."""
        pairs = zip(values, self._parts, strict=True)
        return torch.cat([neighbour_mean(part[self.first :], thin.neighbours) for part, thin in pairs])

    def widen(self, found: list[Tensor]) -> list[Tensor]:
        """A dropped patch has the mean of its neighbours, as it has their change."""
        if self._rows is None:
            return found
        values = torch.cat([part.flatten(0, 1) for part in found])
        if len(values) == len(self._start):
            return found
        out = values.new_zeros(len(self._start), *values.shape[1:])
        out[self._rows], out[self._gone] = values, self._spread(values.split(self._counts))
        return [out.unflatten(0, (-1, self._full.shape[-2]))]

    def _check_recomputed(self, block: nn.Module) -> None:
        if block.training and getattr(block, "gradient_checkpointing", False):
            raise NotImplementedError(
                f"Reducer {self.reducer.name!r} changes the inside of a block of the vision tower, which gradient "
                "checkpointing computes anew without it: use stabilised=0, or no checkpointing."
            )


def _patches(tokens: Tensor, size: int) -> Tensor:
    """(n * size,) long: the patches of tokens, which stand side by side."""
    return (tokens[:, None] * size + torch.arange(size, device=tokens.device)).flatten()
