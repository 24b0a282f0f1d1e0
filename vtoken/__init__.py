# SPDX-License-Identifier: Apache-2.0
"""Training-free visual-token reducers for stock Hugging Face vision-language models.

This file owns the flat public API: the names of `_HOMES` and the reducers. It must not import torch or transformers: a
name is imported when it is first used, so that ``vtoken --help``, whose code is a part of this package, starts at once.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers what `_HOMES` is for Python
    from vtoken.budget import budget as budget
    from vtoken.context import Cut as Cut
    from vtoken.context import ItemLayout as ItemLayout
    from vtoken.context import Thinned as Thinned
    from vtoken.context import TowerContext as TowerContext
    from vtoken.context import VisualContext as VisualContext
    from vtoken.doctor import check as check
    from vtoken.drawing import draw as draw
    from vtoken.encoder import EncoderRead as EncoderRead
    from vtoken.light import LightLayer as LightLayer
    from vtoken.reducers import *  # noqa: F403
    from vtoken.registry import get_reducer as get_reducer
    from vtoken.registry import list_presets as list_presets
    from vtoken.registry import list_reducers as list_reducers
    from vtoken.registry import register as register
    from vtoken.shorten import shorten as shorten
    from vtoken.stats import ImageStats as ImageStats
    from vtoken.stats import Stats as Stats
    from vtoken.tokenmap import TokenMap as TokenMap
    from vtoken.tokenmap import token_map as token_map
    from vtoken.wrapping import reduce as reduce
    from vtoken.wrapping import stats as stats
    from vtoken.wrapping import unwrap as unwrap
    from vtoken.wrapping import wrap as wrap

__version__ = "0.2.0"

_HOMES = {
    "Cut": "context",
    "EncoderRead": "encoder",
    "ImageStats": "stats",
    "ItemLayout": "context",
    "LightLayer": "light",
    "Stats": "stats",
    "Thinned": "context",
    "TokenMap": "tokenmap",
    "TowerContext": "context",
    "VisualContext": "context",
    "budget": "budget",
    "check": "doctor",
    "draw": "drawing",
    "get_reducer": "registry",
    "list_presets": "registry",
    "list_reducers": "registry",
    "reduce": "wrapping",
    "register": "registry",
    "shorten": "shorten",
    "stats": "wrapping",
    "token_map": "tokenmap",
    "unwrap": "wrapping",
    "wrap": "wrapping",
}
"""Public names that are no reducers -> the modules of this package that they come from."""

if not TYPE_CHECKING:  # a type checker would conclude that every name exists

    def __getattr__(name: str) -> Any:
        """A public name or a module of this package, at its first use (PEP 562)."""
        if home := _HOMES.get(name):
            found = getattr(importlib.import_module(f"{__name__}.{home}"), name)
        elif name == "__all__":
            found = [*_HOMES, *importlib.import_module(f"{__name__}.reducers").__all__]
        elif name.startswith("_"):  # what Python's own tools look for in any module
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        elif importlib.util.find_spec(f"{__name__}.{name}"):
            found = importlib.import_module(f"{__name__}.{name}")
        elif name in (reducers := importlib.import_module(f"{__name__}.reducers")).__all__:
            found = getattr(reducers, name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})


class _Package(ModuleType):
    """The type of this package. ``budget``, ``shorten`` and ``stats`` name a function and also a module: once that is
    loaded, the import system would put the module in the place of the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
