# SPDX-License-Identifier: Apache-2.0
"""Visual-token reducers, one method a file. Importing this package registers all of them."""

from vtoken.reducers.base import KeepReducer, MergeReducer, Reducer, ScoreReducer, SelectReducer
from vtoken.reducers.chain import Chain
from vtoken.reducers.fopru import FoPru
from vtoken.reducers.idpruner import IDPruner
from vtoken.reducers.pooled import Pooled
from vtoken.reducers.random import Random
from vtoken.reducers.todre import ToDRE
from vtoken.reducers.uniform import Uniform

__all__ = [
    "Chain",
    "FoPru",
    "IDPruner",
    "KeepReducer",
    "MergeReducer",
    "Pooled",
    "Random",
    "Reducer",
    "ScoreReducer",
    "SelectReducer",
    "ToDRE",
    "Uniform",
]
