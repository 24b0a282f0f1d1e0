# SPDX-License-Identifier: Apache-2.0
"""Statistics and selections are defined in float32, whatever precision the model runs in."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Products of float32 numbers stay float32: autocast, under which a model may run, would round them."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def selection(function: Callable[P, T]) -> Callable[P, T]:
    """For a function of tensors that chooses tokens: no gradients, no autocast."""

    @functools.wraps(function)
    def choose(*args: P.args, **kwargs: P.kwargs) -> T:
        devices = (value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.no_grad(), without_autocast(next(devices, torch.device("cpu"))):
            return function(*args, **kwargs)

    return choose
