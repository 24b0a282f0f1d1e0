# SPDX-License-Identifier: Apache-2.0
"""A gallery as one picture, or as a page that needs no network."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtoken.drawing import WHITE
from vtoken.eval.errors import EvalError, MissingExtraError
from vtoken.eval.model.preprocessing import as_jpeg

if TYPE_CHECKING:
    from PIL.Image import Image

    from vtoken.eval.show.gallery import Gallery, Shown

MARGIN, LINE, LETTERS, WIDE = 12, 18, 7.0, 240  # pixels; of a letter; of a column at least
INK = (24, 24, 24)
LEGEND = "bright: kept · dim: dropped inside of the decoder · dark: never entered it"
FORMATS = (".png", ".jpg", ".jpeg", ".html")


def save(found: Gallery, path: Path) -> None:
    """Write a PNG, JPEG or HTML file, as its name says."""
    if path.suffix.lower() == ".html":
        path.write_text(as_html(found), encoding="utf-8")
    else:
        as_picture(found).save(path)


def check_name(path: Path) -> None:
    """Refuse a file name that says no known format, or a folder that is not there.

    Raises
    ------
    EvalError
        One sentence.
    """
    if path.suffix.lower() not in FORMATS:
        raise EvalError(f"--out {str(path)!r} has no known ending: give one of {', '.join(FORMATS)}.")
    if not path.parent.is_dir():
        raise EvalError(f"--out {str(path)!r} is in a folder that does not exist: make {str(path.parent)!r} first.")


def captions(shown: Shown) -> list[str]:
    """What is written below a cell's picture."""
    if shown.picture is None:
        return [shown.why]
    inside = "" if shown.last == shown.kept else f", {shown.last or 'none'} behind the last layer"
    lines = [f"{shown.kept} of {shown.tokens} tokens{inside}", f"{shown.milliseconds:.1f} ms to select"]
    return lines if shown.answer is None else [*lines, f"“{shown.answer}”"]


def heading(found: Gallery) -> list[str]:
    """What is written above the grid."""
    lines = [f"{found.model}: {found.tokens} visual tokens"]
    if found.question is not None:
        lines += [f"Question: {found.question}", f"Unpruned answer: “{found.answer}”"]
    return [*lines, LEGEND]


def as_picture(found: Gallery) -> Image:
    """The grid, a reducer a row and a keep ratio a column, the unpruned picture above it."""
    from PIL import Image, ImageDraw, ImageFont

    width = max(found.picture.width, WIDE)
    font = ImageFont.load_default(13)
    rows = [[_lines(captions(cell), width) for cell in cells] for _, cells in found.rows]
    heights = [found.picture.height + LINE * (1 + max(map(len, texts))) + MARGIN for texts in rows]
    head = _lines(heading(found), max(width * len(found.keeps), 480))
    top = found.picture.height + LINE * len(head) + 4 * MARGIN
    size = (
        max(width, 480 // len(found.keeps)) * len(found.keeps) + MARGIN * (len(found.keeps) + 1),
        top + sum(heights),
    )
    sheet = Image.new("RGB", size, WHITE)
    pen = ImageDraw.Draw(sheet)
    sheet.paste(found.picture, (MARGIN, MARGIN))
    _write(pen, head, MARGIN, found.picture.height + 2 * MARGIN, font)
    for (title, cells), texts, height in zip(found.rows, rows, heights, strict=True):
        for column, (cell, lines) in enumerate(zip(cells, texts, strict=True)):
            left = MARGIN + column * (width + MARGIN)
            _write(pen, [f"{title}, keep {found.keeps[column]}"], left, top, font)
            if cell.picture is not None:
                sheet.paste(cell.picture, (left, top + LINE))
            below = top + LINE + (0 if cell.picture is None else found.picture.height + 2)
            _write(pen, lines, left, below, font)
        top += height
    return sheet


def _lines(texts: list[str], width: int) -> list[str]:
    return [line for text in texts for line in textwrap.wrap(text, max(int(width / LETTERS), 8)) or [""]]


def _write(pen: Any, lines: list[str], left: int, top: int, font: Any) -> None:
    for number, line in enumerate(lines):
        pen.text((left, top + number * LINE), line, INK, font)


def as_html(found: Gallery) -> str:
    """A page with all pictures in it."""
    try:
        from jinja2 import Environment, PackageLoader
    except ImportError as error:
        raise MissingExtraError("Writing HTML", "jinja2") from error
    environment = Environment(loader=PackageLoader("vtoken.eval.show", "templates"), autoescape=True)
    return environment.get_template("show.html.j2").render(
        found=found, heading=heading(found), captions=captions, jpeg=as_jpeg
    )
