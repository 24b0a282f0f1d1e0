# SPDX-License-Identifier: Apache-2.0
"""Which reducer ``vtoken.wrap(model)`` takes when none is named: what did best in the project's own comparison.

The table beside this file is written by ``benchmarks/defaults.py`` from the committed results, never by hand. It holds
reducers that spend no more token-layers than their keep ratio, best first, by family and ratio. Families that were not
measured take what did best on average.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vtoken.budget import Keep, check_keep

FILE = Path(__file__).with_name("defaults.json")
OTHERS = "others"
UNTOLD = 0.25
"""The ratio taken for a ``keep`` that is a number of tokens, or not given: the default of all reducers."""


def default_reducers(model_type: str, keep: Keep | None = None) -> list[str]:
    """Names of reducers or presets, best first.

    Parameters
    ----------
    model_type : str
        ``config.model_type``.
    keep : float, int or None
        The measured ratio nearest to it decides; `UNTOLD` for a number of tokens.
    """
    ratio = UNTOLD if keep is None else check_keep(keep)
    ratio = UNTOLD if isinstance(ratio, int) else ratio
    families: Mapping[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))["families"]
    rows = families.get(model_type, families[OTHERS])
    return rows[min(rows, key=lambda measured: abs(math.log(float(measured) / ratio)))]
