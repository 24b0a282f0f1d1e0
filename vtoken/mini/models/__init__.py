# SPDX-License-Identifier: Apache-2.0
"""The architectures of the embedded models, one a file: the untrained model, its processor, and its visual tokens."""

from __future__ import annotations

from vtoken.mini.models import internvl, llava, llava_next, qwen2_5_vl
from vtoken.mini.models.base import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    module.ARCHITECTURE.name: module.ARCHITECTURE for module in (llava, llava_next, internvl, qwen2_5_vl)
}
"""Name of the embedded model -> architecture."""
