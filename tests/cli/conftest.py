# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures."""

from evaluation import checkpoint, make_cell, private_cache  # noqa: F401
