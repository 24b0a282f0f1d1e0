# SPDX-License-Identifier: Apache-2.0
"""Save a trained model as the package ships it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any


def export(model: Any, processor: Any, folder: Path) -> None:
    """Save model (float16) and processor as `transformers` loads them, and the digest that is checked at load."""
    model.half().save_pretrained(folder)
    model.float()
    processor.save_pretrained(folder)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "sha256").write_text(digest + "\n")
