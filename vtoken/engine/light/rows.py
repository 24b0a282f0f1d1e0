# SPDX-License-Identifier: Apache-2.0
"""Hooks that let a row-wise module (a feed-forward network, a projection) compute some of its rows only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Narrow = Callable[[], dict[str, Tensor]]
"""Parameters of a module that the other rows are computed with, by name."""


class OnlyRows:
    """A pair of hooks on one module: the rows named are computed, the others are zero.

    Parameters
    ----------
    rows : callable
        The rows to compute now, (B, S) bool, or None to compute all (a decode step).
    narrow : callable, optional
        Smaller parameters with which the module itself computes the other rows, in place of zeros.
    """

    def __init__(self, rows: Callable[[], Tensor | None], narrow: Narrow | None = None) -> None:
        self.rows, self.narrow = rows, narrow
        self._called: tuple[Tensor, Tensor] | None = None  # the rows of the call under way, and its whole input
        self._inside = False

    def attach(self, module: nn.Module) -> list[Any]:
        """Install the hooks; returns their handles."""
        return [module.register_forward_pre_hook(self._before), module.register_forward_hook(self._after)]

    def _before(self, module: nn.Module, args: tuple) -> Any:
        if self._inside:
            return None
        self._called = None  # what a call left that raised is not this one's
        rows = self.rows()
        return None if rows is None else self._gather(rows, args)

    def _after(self, module: nn.Module, args: tuple, output: Tensor) -> Any:
        if self._inside or self._called is None:
            return None
        return self._scatter(module, output)

    @torch.compiler.disable
    def _gather(self, rows: Tensor, args: tuple) -> tuple:
        hidden = args[0]
        rows = rows.to(hidden.device)
        self._called = rows, hidden
        return (hidden[rows][None], *args[1:])

    @torch.compiler.disable
    def _scatter(self, module: nn.Module, output: Tensor) -> Tensor:
        rows, hidden = self._called  # type: ignore[misc]
        self._called = None
        rows = rows.to(output.device)
        whole = output.new_zeros(*rows.shape, output.shape[-1])
        whole[rows] = output[0]
        if self.narrow is not None and not bool(rows.all()):
            whole[~rows] = self._narrowly(module, hidden.to(output.device)[~rows][None])[0]
        return whole

    def _narrowly(self, module: nn.Module, hidden: Tensor) -> Tensor:
        self._inside = True
        try:
            return functional_call(module, self.narrow(), (hidden,))  # type: ignore[misc]
        finally:
            self._inside = False
