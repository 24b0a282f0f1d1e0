# SPDX-License-Identifier: Apache-2.0
"""Drops patches inside of the vision tower: its later blocks compute fewer rows, its outward shapes stay.

Every block from the cut on gets the kept rows only. What it returns is written into a tensor of full length, in which a
dropped patch keeps the hidden state it had before the cut. So all that looks at the tower from outside (recorded hidden
states, the feature layer, pixel shuffles, anyres packing) finds the shapes it expects.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtoken import compat
from vtoken.context import TowerContext
from vtoken.encoder import EncoderRead, statistic
from vtoken.precision import without_autocast

if TYPE_CHECKING:
    from vtoken.adapters.base import Adapter
    from vtoken.reducers.base import Reducer


class TowerCut:
    """One reducer at work inside of the tower, during one call of ``get_*_features``.

    Parameters
    ----------
    adapter : Adapter
        Knows the blocks, and which patches become one token.
    reducer : Reducer
        One with an ``in_tower`` stage.
    modality : str
        ``"image"`` or ``"video"``.

    Raises
    ------
    ValueError
        If the reducer names a block that has no block before it.
    """

    def __init__(self, adapter: Adapter, reducer: Reducer, modality: str) -> None:
        self.adapter, self.reducer, self.modality = adapter, reducer, modality
        self.first = adapter.leading_tokens
        named = reducer.tower_block()
        self.block = max(adapter.tower_block(named), int(isinstance(named, float)))  # a share is at least block 1
        if self.block < 1:
            raise ValueError(
                f"Reducer {reducer.name!r} cuts before block {named} of the vision tower, which is its first: there is "
                f"no attention yet, so name one of 1 to {len(adapter.tower_blocks) - 1}."
            )
        self.reads = {name: EncoderRead(name).resolve(self.first > 0).what for name in reducer.tower_reads()}
        self.kept: list[Tensor] = []
        """Per call of the tower (V, tokens) bool."""
        self.patches: tuple[int, int] = (0, 0)
        """Patches of all views, and those that the later blocks compute."""
        self._rows = torch.empty(0, dtype=torch.long, device="cpu")
        """(V, n): rows that the blocks work on, in the present call of the tower."""
        self._found: dict[str, Tensor] = {}
        self._full = self._short = torch.empty(0, dtype=torch.float32, device="cpu")

    def open(self, stack: contextlib.ExitStack) -> None:
        """Install the hooks until the stack closes."""
        for block in self.adapter.tower_blocks[self.block :]:
            before = block.register_forward_pre_hook(self._before, with_kwargs=True)
            # prepend: transformers records hidden states by hooks of its own, which must see the restored ones
            after = block.register_forward_hook(self._after, prepend=True)
            stack.callback(before.remove)
            stack.callback(after.remove)

    def note(self, query: Tensor, key: Tensor, scale: float) -> None:
        """Take the statistics of the patches from queries and keys of the block before the cut."""
        found = {name: statistic(what, query, key, scale, self.first) for name, what in self.reads.items()}
        self._found = {name: values[:, self.first :] for name, values in found.items()}

    def widen(self, found: list[Tensor]) -> list[Tensor]:
        """Statistics (V, n, ...) of the tokens kept in each call of the tower to (V, tokens, ...), zero elsewhere."""
        out = []
        for values, kept in zip(found, self.kept, strict=True):
            out.append(values.new_zeros(*kept.shape, *values.shape[2:]))
            out[-1][kept] = values.flatten(0, 1)
        return out

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        hidden = args[0]
        if module is self.adapter.tower_blocks[self.block]:
            groups = self.adapter.tower_groups(hidden.shape[-2] - self.first, self.modality)
            self._check(module, args, kwargs)
            self._full, self._rows = hidden, self._choose(hidden, groups.to(hidden.device))
        elif hidden is self._full:
            return (self._short, *args[1:]), kwargs
        rows = self._rows[..., None].expand(-1, -1, hidden.shape[-1])
        return (hidden.gather(1, rows), *args[1:]), kwargs

    def _after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        self._short = output[0] if isinstance(output, tuple) else output
        rows = self._rows[..., None].expand_as(self._short)
        self._full = self._full.scatter(1, rows, self._short)
        return (self._full, *output[1:]) if isinstance(output, tuple) else self._full

    def _choose(self, hidden: Tensor, groups: Tensor) -> Tensor:
        """(V, n) rows that stay: leading tokens and the patches of the groups that the reducer names, in order."""
        if len(self._found) < len(self.reads):
            raise ValueError(
                f"The vision tower of {type(self.adapter.model).__name__} computes its attention with code of its own, "
                "which cannot be read: use a reducer that acts before the language model."
            )
        members = groups.argsort(stable=True).view(int(groups.max()) + 1, -1)
        with without_autocast(hidden.device):
            picked = self.reducer.in_tower(TowerContext({k: v[:, members].mean(-1) for k, v in self._found.items()}))
        self._found = {}
        chosen = members[picked].flatten(1).sort(1).values
        first = torch.arange(self.first, device=hidden.device).expand(len(hidden), -1)
        rows = torch.cat([first, chosen + self.first], 1)
        before, after = self.patches
        self.patches = (before + hidden.shape[:2].numel() - first.numel(), after + rows.numel() - first.numel())
        self.kept.append(torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device).scatter_(1, rows, True))
        return rows

    def _check(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        extras = [x for value in (*args[1:], *kwargs.values()) for x in (value if type(value) is tuple else (value,))]
        if args[0].dim() != 3 or any(isinstance(x, Tensor) for x in extras):
            raise ValueError(
                f"The vision tower of {type(self.adapter.model).__name__} hands its blocks more than hidden states of "
                "(views, patches, width), such as masks or rotary tables, which cannot be cut along: use a reducer "
                "that acts before the language model."
            )
        compat.check_checkpointing(module, "vision tower")
