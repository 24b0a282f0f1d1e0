# SPDX-License-Identifier: Apache-2.0
"""Training-free visual-token reducers for stock Hugging Face vision-language models."""

from vtoken.budget import budget
from vtoken.context import Cut, ItemLayout, TowerContext, VisualContext
from vtoken.encoder import EncoderRead
from vtoken.light import LightLayer
from vtoken.reducers import *  # noqa: F403
from vtoken.reducers import __all__ as _reducers
from vtoken.registry import get_reducer, list_presets, list_reducers, register
from vtoken.shorten import shorten
from vtoken.stats import ImageStats, Stats
from vtoken.tokenmap import TokenMap, token_map
from vtoken.wrapping import reduce, stats, unwrap, wrap

__version__ = "0.1.0"

__all__ = [
    *_reducers,
    "Cut",
    "EncoderRead",
    "ImageStats",
    "ItemLayout",
    "LightLayer",
    "Stats",
    "TokenMap",
    "TowerContext",
    "VisualContext",
    "budget",
    "get_reducer",
    "list_presets",
    "list_reducers",
    "reduce",
    "register",
    "shorten",
    "stats",
    "token_map",
    "unwrap",
    "wrap",
]
