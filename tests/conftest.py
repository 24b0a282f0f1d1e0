# SPDX-License-Identifier: Apache-2.0
"""Settings of the whole suite."""

from __future__ import annotations

import torch

torch.set_num_threads(1)  # the suite runs in one process per core
