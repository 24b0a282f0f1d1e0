# SPDX-License-Identifier: Apache-2.0
"""IPCV: patches that change little leave the vision tower early, and are rebuilt before the projector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtoken.budget import Keep, budget, check_keep, is_identity
from vtoken.context import Thinned
from vtoken.ops import top_k
from vtoken.ops.neighbours import nearest_rows
from vtoken.precision import selection
from vtoken.reducers.base import Reducer
from vtoken.reducers.checks import check_block, check_count
from vtoken.registry import register


@register("ipcv")
@dataclass(frozen=True)
class IPCV(Reducer):
    """Compute few patches in most of the vision tower, and hand all of them to the projector (IPCV, arXiv 2512.18747).

    Patches that one block changed least are dropped before the next one. A dropped patch is worth its state at the cut
    and the mean of what happened since to the ``neighbours`` kept patches that were nearest to it then. In the first
    ``stabilised`` blocks after the cut all patches, rebuilt so, are attended to, and only the feed-forward network
    skips them; later blocks compute kept patches alone. Behind the last block all are rebuilt. So the language model
    gets all tokens: put a reducer behind it, ``Chain([IPCV(), DART(keep=0.25)])``, as the authors do.

    It serves Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5, whose packed towers it can cut, and towers whose views have
    one size, no mask and no rotary tables (InternViT, CLIP, SigLIP). The paper has Qwen2-VL and InternVL2; presets
    ``ipcv-qwen2-vl`` and ``ipcv-internvl2`` are its settings.

    Parameters
    ----------
    keep : float or int
        Share, or number, of the patches of each picture or clip (of each view, where pictures are cut into views) that
        stay in the tower. It says nothing about tokens. 1.0 is the identity.
    block : int or float
        The first block that computes kept patches only, from 1; or a share of the depth in (0, 1).
    neighbours : int
        Kept patches that a dropped one is rebuilt from.
    stabilised : int or float
        Blocks, from the cut on, in which all patches are attended to; or a share of the depth in (0, 1).

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """

    summary = "Drops patches that change little inside the vision tower, and rebuilds them before the projector."
    paper = "2512.18747"

    keep: Keep = 0.35
    block: int | float = 0.1
    neighbours: int = 10
    stabilised: int | float = 0.22

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", check_keep(self.keep))
        check_block("block", self.block)
        check_count("neighbours", self.neighbours)
        if isinstance(self.stabilised, float):
            check_block("stabilised", self.stabilised)
        else:
            check_count("stabilised", self.stabilised, 0)

    @property
    def is_identity(self) -> bool:
        return is_identity(self.keep)

    def tower_block(self) -> int | float:
        return self.block

    def tower_whole(self) -> int | float:
        return self.stabilised

    def thin_tower(self, states: Tensor, before: Tensor) -> Thinned:
        """Keep the patches that the block before changed most."""
        if not bool(states.isfinite().all()):
            raise ValueError(
                f"Reducer {self.name!r} found states in the vision tower that are not finite: check the model's dtype "
                "(float16 overflows) and its inputs."
            )
        count = int(budget(self.keep, torch.tensor([len(states)], device="cpu")))
        keep = changed_most(states, before, count)
        return Thinned(keep, rebuilt_from(states, keep, self.neighbours))


@selection
def changed_most(states: Tensor, before: Tensor, count: int) -> Tensor:
    """(count,) long, ascending: the rows (L, C) whose ``states`` are furthest from those ``before``."""
    return top_k(change(states, before)[None], count)[0].sort().values


def change(states: Tensor, before: Tensor) -> Tensor:
    """(L,) Euclidean distance of each row of ``states`` (L, C) from the one ``before``."""
    return (states.float() - before.float()).norm(dim=-1)


@selection
def rebuilt_from(states: Tensor, keep: Tensor, neighbours: int) -> Tensor:
    """(R, k) long: for each row that is not kept, those among the kept ones that are nearest to it."""
    gone = torch.ones(len(states), dtype=torch.bool, device=states.device)
    gone[keep] = False
    return nearest_rows(states[gone], states[keep], neighbours)
