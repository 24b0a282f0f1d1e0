# SPDX-License-Identifier: Apache-2.0
"""A method of one instance, replaced until it is put back: nothing is patched for anyone else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def replace_method(
    owner: Any, name: str, make: Callable[[Callable], Callable], default: Any = None
) -> Callable[[], None]:
    """Put ``make(original)`` in the place of a method of ``owner``; returns what undoes it."""
    original, own = getattr(owner, name, default), vars(owner).get(name)
    setattr(owner, name, functools.wraps(original)(make(original)))
    return lambda: delattr(owner, name) if own is None else setattr(owner, name, own)
