# SPDX-License-Identifier: Apache-2.0
"""Bundled lmms-eval tasks; this folder is what ``--include_path`` takes."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def bundled_tasks() -> dict[str, Path]:
    """Name of every bundled task -> its YAML."""
    return {path.stem: path for path in sorted(FOLDER.glob("mini*.yaml"))}
