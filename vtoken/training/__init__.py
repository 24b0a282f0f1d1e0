# SPDX-License-Identifier: Apache-2.0
"""Training of the small parts that two published methods need: DyVTE's gates and the relevance scorer.

The vision-language model itself stays frozen. ``vtoken train-gate`` and ``vtoken train-scorer`` call what is here.
"""

from vtoken.training.calibration import exit_divergence
from vtoken.training.examples import Batch, Example, JsonlSource, MiniSource, Source, collate
from vtoken.training.gate import train_gate
from vtoken.training.loop import Plan
from vtoken.training.scorer import train_scorer

__all__ = [
    "Batch",
    "Example",
    "JsonlSource",
    "MiniSource",
    "Plan",
    "Source",
    "collate",
    "exit_divergence",
    "train_gate",
    "train_scorer",
]
