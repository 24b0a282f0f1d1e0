# SPDX-License-Identifier: Apache-2.0
"""Where commands write, and how they say no: one sentence on stderr, exit code 2."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer
from rich.console import Console

WRONG_INPUT = 2
FAILED = 1
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def out() -> Console:
    """The console for results; made anew so that redirections are honoured."""
    return Console()


def err() -> Console:
    """The console for progress and errors."""
    return Console(stderr=True)


@contextlib.contextmanager
def sentences() -> Iterator[None]:
    """Turn errors about input into a sentence: wrap what reads and checks input, never what computes."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        err().print(f"[bold red]Error:[/] {_escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(WRONG_INPUT) from None


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
