# SPDX-License-Identifier: Apache-2.0
"""Load an embedded model; its weights are checked first."""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path
from typing import Any

import torch

WEIGHTS = Path(__file__).parent / "weights"
LEARNED = Path(__file__).parent / "learned"


def names() -> list[str]:
    """Names of the embedded models."""
    return sorted(path.parent.name for path in WEIGHTS.glob("*/config.json"))


def folder(name: str) -> Path:
    """The folder of an embedded model, as ``from_pretrained`` takes it.

    Raises
    ------
    ValueError
        If there is no such model, or its weights are not the ones that were shipped.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names())}."
        raise ValueError(f"Unknown embedded model {name!r}: {hint}")
    path = WEIGHTS / name
    check(path)
    return path


def learned(name: str, what: str) -> Path:
    """Where a small part that was trained on an embedded model (``"gate"``, ``"scorer"``) is, if it is shipped."""
    return LEARNED / name / f"{what}.safetensors"


def check(path: Path) -> None:
    """Compare the weights in a folder with their committed digest.

    Raises
    ------
    ValueError
        If they differ or are missing.
    """
    weights = path / "model.safetensors"
    wanted = (path / "sha256").read_text().strip()
    found = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else "no file"
    if found != wanted:
        raise ValueError(
            f"The weights {weights} are damaged (sha256 {found[:12]}, expected {wanted[:12]}): install vtoken again."
        )


def load(name: str = "mini-llava", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load an embedded model and its processor.

    Parameters
    ----------
    name : str
        One of `names`.
    dtype : torch.dtype
        Of the parameters; they are stored in float16.

    Returns
    -------
    model, processor
        In eval mode, on the CPU.

    Raises
    ------
    ValueError
        If the name is unknown or the weights are damaged.
    """
    return read(folder(name), dtype)


def read(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """What `load` does with the folder of a model."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
    return model.eval(), AutoProcessor.from_pretrained(path)
