# SPDX-License-Identifier: Apache-2.0
"""Sentences for wrong input, and what an error of another package says."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EvalError(ValueError):
    """Wrong input or surroundings of an evaluation; the message is one sentence that says what to do."""


class MissingExtraError(EvalError):
    """A package of an optional extra is not installed."""

    def __init__(self, what: str, package: str, extra: str = "eval") -> None:
        super().__init__(f'{what} needs {package}, which is not installed: pip install "vtoken[{extra}]".')


def unknown(what: str, name: str, known: Iterable[str], listing: str = "") -> EvalError:
    """The error for an unknown name, with the nearest known one.

    Parameters
    ----------
    what : str
        Kind of thing, capitalized by the caller's sentence: ``"task"``, ``"model"``.
    name : str
        What was given.
    known : iterable of str
        What would have been possible.
    listing : str
        How to see all of them, used where nothing is near and the list is long.
    """
    names = sorted(map(str, known))
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    if near:
        hint = f"did you mean {near[0]!r}?"
    elif listing:
        hint = f"{listing}."
    else:
        hint = f"known are {', '.join(names)}."
    return EvalError(f"Unknown {what} {name!r}: {hint}")


def reason(error: BaseException) -> str:
    """What went wrong; lmms-eval wraps errors of datasets and scoring into a `tenacity.RetryError`."""
    attempt = getattr(error, "last_attempt", None)
    inner = attempt.exception() if attempt is not None else None
    return str(inner or error) or type(inner or error).__name__


def first_line(text: str) -> str:
    """What a line on the terminal says of an error."""
    return (text.splitlines() or ["unknown error"])[0]


class DocumentError(RuntimeError):
    """Documents of a task that could not be asked about; the message names them.

    Parameters
    ----------
    task : str
    documents : iterable of int
        One, or those of a batch that failed as a whole.
    error : Exception
        What was raised; it becomes the cause.
    """

    def __init__(self, task: str, documents: Iterable[int], error: Exception) -> None:
        self.task, self.documents = task, tuple(documents)
        first, last = min(self.documents), max(self.documents)
        which = f"document {first}" if first == last else f"documents {first} to {last}"
        super().__init__(f"{which} of task {task!r}: {reason(error)}")
        self.__cause__ = error
