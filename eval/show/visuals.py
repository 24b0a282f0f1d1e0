# SPDX-License-Identifier: Apache-2.0
"""Pictures and clips to look at: from files, or one of the bundled world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vtoken.eval.errors import EvalError, MissingExtraError

CLIPS = (".mp4", ".mov", ".avi", ".mkv", ".webm")
FRAMES = 8  # of a clip, evenly spaced


def read(path: Path) -> Any:
    """A picture (PIL, RGB), or a clip: (T, H, W, 3) uint8 frames.

    Raises
    ------
    EvalError
        If there is no such file, or it can't be read as either.
    """
    if not path.is_file():
        raise EvalError(f"There is no picture {str(path)!r}: name an image, or a clip ({', '.join(CLIPS)}).")
    return _clip(path) if path.suffix.lower() in CLIPS else read_picture(path, str(path))


def read_picture(path: Path, name: str) -> Any:
    """A picture (PIL, RGB), upright.

    Raises
    ------
    EvalError
        If the file, which the sentence calls ``name``, can't be read as one.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # decoders raise types of their own
        why = str(error).splitlines()[0].replace(str(path), name)
        raise EvalError(f"{name!r} cannot be read as a picture: {why}.") from error


def _clip(path: Path) -> np.ndarray:
    try:
        import decord
    except ImportError as error:
        raise MissingExtraError("Reading clips", "decord") from error
    try:
        reader = decord.VideoReader(str(path))
        count = max(2, min(FRAMES, len(reader)) // 2 * 2)  # towers take them in pairs
        return reader.get_batch(np.linspace(0, len(reader) - 1, count).round().astype(int).tolist()).asnumpy()
    except Exception as error:
        raise EvalError(f"{str(path)!r} cannot be read as a clip: {str(error).splitlines()[0]}.") from error


def bundled() -> tuple[Any, str]:
    """A picture of the embedded models' world, and a question about it."""
    from PIL import Image

    from vtoken.mini.documents import held_out

    document = held_out("attr", 1)[0]
    return Image.fromarray(document.images[0]), document.question
