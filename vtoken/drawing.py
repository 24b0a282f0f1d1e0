# SPDX-License-Identifier: Apache-2.0
"""What became of the visual tokens of a prompt, drawn over its pictures.

Bright: kept to the last layer. Dim: dropped inside of the decoder. Dark: never entered it. This file must not know
reducers, files or reports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from vtoken.tokenmap import TokenMap, token_map

if TYPE_CHECKING:
    from PIL.Image import Image

LONG_EDGE = 384  # pixels of a drawn picture
BEFORE, INSIDE = 0.78, 0.45  # how dark: dropped before the decoder, dropped inside it
GAP = 8  # pixels between pictures
WHITE = (255, 255, 255)


def draw(
    model: nn.Module,
    inputs: Mapping[str, Any],
    images: Any,
    *,
    processor: Any = None,
    edge: int = LONG_EDGE,
) -> Image:
    """Draw what the reducer of a wrapped model did with the pictures of the prompt that it has just run.

    In a notebook the result shows itself.

    Parameters
    ----------
    model : nn.Module
        Wrapped; its last forward or generate was of this prompt.
    inputs : mapping
        What the model's processor returned.
    images : PIL image, (T, H, W, 3) array, or a sequence of them
        The pictures that the processor was given, in the order of the prompt, all images before all clips; a clip is
        an array of frames and becomes a strip.
    processor : optional
        Tells whether the borders of pictures are cut off (LLaVA-1.5); without it they are taken to be shown whole.
    edge : int
        Pixels of the long edge of a drawn picture.

    Returns
    -------
    PIL image
        The pictures side by side: as they are where a token is kept, dim where it is dropped inside of the decoder,
        dark where it never entered. Where views overlap, the token that is kept longest counts.

    Raises
    ------
    ValueError
        If the model's last prompt was another one, or the pictures are of another number than the prompt's.
    """
    shown = [seen(image, processor) for image in (images if isinstance(images, list | tuple) else [images])]
    tokens = token_map(model, inputs, [size_of(image) for image in shown])
    if not tokens.kept:
        raise ValueError(
            "Nothing is known of what became of these pictures' tokens: wrap the model, run this very prompt with "
            "forward or generate, and draw it then."
        )
    return beside([shade(image, tokens, number, edge) for number, image in enumerate(shown)])


def size_of(image: Any) -> tuple[int, int]:
    """(height, width) of a picture or of the frames of a clip."""
    return image.shape[1:3] if isinstance(image, np.ndarray) else (image.height, image.width)


def seen(image: Any, processor: Any) -> Any:
    """What the model sees of an image: a processor that crops scales the short edge to the crop's and cuts the rest."""
    if isinstance(image, np.ndarray):
        return image
    image = image.convert("RGB")
    if not getattr(getattr(processor, "image_processor", None), "do_center_crop", False):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def kept(tokens: TokenMap, choose: Callable = max) -> np.ndarray:
    """Which tokens are there after the first (``min``) or the last (``max``) cut."""
    if not tokens.kept:
        return np.ones(len(tokens), bool)
    return tokens.kept[choose(tokens.kept)].numpy()


def shade(image: Any, tokens: TokenMap, number: int = 0, edge: int = LONG_EDGE) -> Image:
    """One picture of a prompt, the ``number``-th; a clip as a strip of the frames that its views stand for."""
    from PIL import Image as Pillow

    mine = (tokens.image == number).numpy()
    if not isinstance(image, np.ndarray):
        return _shaded(image, tokens, mine, edge)
    views = tokens.view.numpy()
    steps = np.unique(views[mine & (views >= 0)])
    last = max(len(image) - 1, 0)
    frames = []
    for place, view in enumerate(steps):
        frame = Pillow.fromarray(image[min(place * len(image) // len(steps), last)])
        frames.append(_shaded(frame, tokens, mine & (views == view), edge))
    return beside(frames)


def _shaded(image: Image, tokens: TokenMap, mine: np.ndarray, edge: int) -> Image:
    from PIL import Image as Pillow

    scale = edge / max(image.size)
    large = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    dark = np.full((large.height, large.width), BEFORE)
    levels = np.where(kept(tokens), 0.0, np.where(kept(tokens, min), INSIDE, BEFORE))
    boxes = tokens.box.numpy() * scale
    for box, level in zip(boxes[mine], levels[mine], strict=True):
        if not np.isnan(box).any():  # a separator
            x0, y0, x1, y1 = np.rint(box).astype(int).clip(0)
            dark[y0:y1, x0:x1] = np.minimum(dark[y0:y1, x0:x1], level)
    return Pillow.fromarray((np.asarray(large) * (1 - dark[..., None])).astype(np.uint8))


def beside(pictures: Sequence[Image]) -> Image:
    """Pictures in one, from left to right."""
    from PIL import Image as Pillow

    if len(pictures) == 1:
        return pictures[0]
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1)
    sheet, left = Pillow.new("RGB", (width, max(picture.height for picture in pictures)), WHITE), 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + GAP
    return sheet
