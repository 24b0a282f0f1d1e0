# SPDX-License-Identifier: Apache-2.0
"""Where commands write, and how they say no: one sentence on stderr, exit code 2."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

WRONG_INPUT = 2
FAILED = 1
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


PIPE_WIDTH = 160  # tables do not wrap in a file


def out() -> Console:
    """The console for results; made anew so that redirections are honoured."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


def err() -> Console:
    """The console for progress and errors."""
    return Console(stderr=True)


def bar(*columns: ProgressColumn, console: Console | None = None) -> Progress:
    """Progress bars, by default with the time left, on stderr or another console where that is a terminal."""
    from rich.progress import Progress

    console = console or err()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextlib.contextmanager
def sentences() -> Iterator[None]:
    """Turn errors about input into a sentence: wrap what reads and checks input, never what computes."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        err().print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(WRONG_INPUT) from None


def items(text: str | None) -> list[Any] | None:
    """A list with commas, as YAML reads it: numbers are numbers, and mappings in braces are possible."""
    import yaml

    if text is None:
        return None
    try:
        found = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        found = [part.strip() for part in text.split(",")]
    return [item for item in found if item is not None]
