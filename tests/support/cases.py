# SPDX-License-Identifier: Apache-2.0
"""Which reducers are tried on which families: one list for all tests that loop over the registry."""

from __future__ import annotations

import tiny

import vtoken

_VIEWS = {"llava_next", "llava_onevision", "internvl", "gemma3", "qwen3_vl", "qwen3_vl_moe"}
REFUSED = {
    "downsample": _VIEWS,  # pictures that cannot be encoded smaller
    "globalcom2": {"llava_onevision", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "gemma3"},  # towers without [CLS]
    "pixelprune": {"llava", *_VIEWS, "gemma3"} - {"qwen3_vl", "qwen3_vl_moe"},  # towers that are no packed sequence
    "tower-prune": {"qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"},  # towers in which nothing can be dropped
    "zooprune": {"gemma3"},
    "yopo": {"qwen3_vl_moe"},
}
"""Reducers that say in a sentence that they cannot serve a family; other tests look at the sentences."""
REWRITING = {
    *("aim", "apet", "pooled", "prumerge", "sparsevlm", "tokencorr", "tome", "visionzip"),  # merge
    *("downsample", "ipcv", "tower-prune"),  # encode the picture in another way
    *("ima", "yopo"),  # leave out a part of the layers' work
}
"""Reducers that do more than drop: what is left is not the stock model with tokens hidden."""
FEW = ["uniform", "fastv", "pyramiddrop", "todre", "tome", "yopo"]
"""One reducer for each place at which something happens, where that decides."""


def pairs(families=tiny.CORE, reducers=None) -> list[tuple[str, str]]:
    """(family, reducer) for all registered reducers that serve the family."""
    names = vtoken.list_reducers() if reducers is None else reducers
    return [(family, name) for family in families for name in names if family not in REFUSED.get(name, ())]
