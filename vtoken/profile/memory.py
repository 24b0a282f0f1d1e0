# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a computation beyond what was there before: measured, on the CPU too."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Follows the storages of all tensors that operations return, until the last reference to them is gone.

    Workspace inside of one kernel is not seen; what an operation hands to the next one is.

    Attributes
    ----------
    peak : int
        Most bytes alive at once.
    largest : int
        Bytes of the largest single storage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):  # what was there before does not count
            if isinstance(leaf, Tensor):
                self._watch(leaf, new=False)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._watch(leaf, new=True)
        return out

    def _watch(self, tensor: Tensor, new: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        weakref.finalize(storage, self._gone, key, size if new else 0)
        if new:
            self.live += size
            self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most memory that ``run`` holds at once, beyond what is allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as tracker:
        run()
    return tracker.peak
