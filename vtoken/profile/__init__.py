# SPDX-License-Identifier: Apache-2.0
"""Measured cost: time by phase, memory and arithmetic, unpruned and reduced in turn.

Nothing here is read off an accuracy run, and no figure is computed where it can be measured.
"""

from vtoken.profile.measure import Profile, Side, profile
from vtoken.profile.prefill import PrefillCost, measure_prefill
from vtoken.profile.spread import Ratio, Spread

__all__ = ["PrefillCost", "Profile", "Ratio", "Side", "Spread", "measure_prefill", "profile"]
