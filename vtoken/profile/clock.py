# SPDX-License-Identifier: Apache-2.0
"""Time that is really spent: host time after the device has finished, and the part of it that modules take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vtoken.adapters import adapter_for
from vtoken.adapters.base import MODALITIES
from vtoken.methods import replace_method


def device_now(device: torch.device) -> float:
    """Host time in seconds after everything queued on the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def now(model: nn.Module) -> float:
    """`device_now` of the device that the model is on."""
    return device_now(next(model.parameters()).device)


class ModuleClock:
    """Adds up the time spent in some modules while entered.

    Parameters
    ----------
    model : nn.Module
        Whose device is waited for.
    *modules : nn.Module
        What is timed; calls of one inside another count for both.
    """

    def __init__(self, model: nn.Module, *modules: nn.Module) -> None:
        self.model, self.modules = model, modules
        self.milliseconds = 0.0
        self._handles: list[Any] = []

    def __enter__(self) -> ModuleClock:
        self.milliseconds = 0.0
        for module in self.modules:
            start, stop = self._hooks()
            self._handles += [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]
        return self

    def __exit__(self, *exc: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _hooks(self) -> tuple[Callable, Callable]:
        begun: list[float] = []

        def start(module: nn.Module, args: tuple) -> None:
            begun.append(now(self.model))

        def stop(module: nn.Module, args: tuple, output: Any) -> None:
            self.milliseconds += (now(self.model) - begun.pop()) * 1e3

        return start, stop


class FeatureClock:
    """Adds up the time of a model's own ``get_image_features`` and ``get_video_features`` while entered.

    Enter it before the model is wrapped: what a session adds to them is then no part of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.outer = model, adapter_for(model).outer
        self.milliseconds = 0.0
        self._begun: float | None = None
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> FeatureClock:
        self.milliseconds = 0.0
        for modality in MODALITIES:
            if hasattr(self.outer, name := f"get_{modality}_features"):
                self._undo.append(replace_method(self.outer, name, self._timed))
        return self

    def __exit__(self, *exc: object) -> None:
        while self._undo:
            self._undo.pop()()

    def _timed(self, method: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._begun is not None:  # one of them calls the other
                return method(*args, **kwargs)
            self._begun = now(self.model)
            try:
                return method(*args, **kwargs)
            finally:
                self.milliseconds += (now(self.model) - self._begun) * 1e3
                self._begun = None

        return timed


def vision_modules(model: nn.Module) -> list[nn.Module]:
    """Vision tower and projector; the tower alone where it holds the projector."""
    adapter = adapter_for(model)
    inside = any(module is adapter.projector for module in adapter.tower.modules())
    return [adapter.tower] if inside else [adapter.tower, adapter.projector]


def vision_clock(model: nn.Module) -> ModuleClock:
    """Times the vision tower and the projector."""
    return ModuleClock(model, *vision_modules(model))
