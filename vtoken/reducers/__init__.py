# SPDX-License-Identifier: Apache-2.0
"""Visual-token reducers, one method a file. Importing this package registers all of them."""

from vtoken.reducers.aim import AIM
from vtoken.reducers.apet import ApET
from vtoken.reducers.base import (
    Assignment,
    KeepReducer,
    LayerReducer,
    MergeReducer,
    Reducer,
    ScoreReducer,
    SelectReducer,
)
from vtoken.reducers.cdpruner import CDPruner
from vtoken.reducers.chain import Chain
from vtoken.reducers.dart import DART
from vtoken.reducers.divprune import DivPrune
from vtoken.reducers.downsample import Downsample
from vtoken.reducers.dyvte import DyVTE
from vtoken.reducers.encoded import EncoderReducer
from vtoken.reducers.explain import Explain
from vtoken.reducers.fastv import FastV
from vtoken.reducers.fopru import FoPru
from vtoken.reducers.globalcom2 import GlobalCom2
from vtoken.reducers.hiprune import HiPrune
from vtoken.reducers.holov import HoloV
from vtoken.reducers.idpruner import IDPruner
from vtoken.reducers.ima import IMA
from vtoken.reducers.ipcv import IPCV
from vtoken.reducers.mmtok import MMTok
from vtoken.reducers.otprune import OTPrune
from vtoken.reducers.pixelprune import PixelPrune
from vtoken.reducers.pooled import Pooled
from vtoken.reducers.prumerge import PruMerge
from vtoken.reducers.prunesid import PruneSID
from vtoken.reducers.pyramiddrop import PyramidDrop
from vtoken.reducers.random import Random
from vtoken.reducers.scope import SCOPE
from vtoken.reducers.sparsevlm import SparseVLM
from vtoken.reducers.todre import ToDRE
from vtoken.reducers.tokencorr import TokenCorr
from vtoken.reducers.tome import ToMe
from vtoken.reducers.towerprune import TowerPrune
from vtoken.reducers.uniform import Uniform
from vtoken.reducers.v2drop import V2Drop
from vtoken.reducers.visionzip import VisionZip
from vtoken.reducers.vispruner import VisPruner
from vtoken.reducers.vtw import VTW
from vtoken.reducers.yopo import YOPO
from vtoken.reducers.zooprune import ZOOPrune

__all__ = [
    "AIM",
    "DART",
    "IMA",
    "IPCV",
    "SCOPE",
    "VTW",
    "YOPO",
    "ApET",
    "Assignment",
    "CDPruner",
    "Chain",
    "DivPrune",
    "Downsample",
    "DyVTE",
    "EncoderReducer",
    "Explain",
    "FastV",
    "FoPru",
    "GlobalCom2",
    "HiPrune",
    "HoloV",
    "IDPruner",
    "KeepReducer",
    "LayerReducer",
    "MMTok",
    "MergeReducer",
    "OTPrune",
    "PixelPrune",
    "Pooled",
    "PruMerge",
    "PruneSID",
    "PyramidDrop",
    "Random",
    "Reducer",
    "ScoreReducer",
    "SelectReducer",
    "SparseVLM",
    "ToDRE",
    "ToMe",
    "TokenCorr",
    "TowerPrune",
    "Uniform",
    "V2Drop",
    "VisPruner",
    "VisionZip",
    "ZOOPrune",
]
