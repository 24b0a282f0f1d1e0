# SPDX-License-Identifier: Apache-2.0
"""Executors: where and by how many processes cells are run. Results do not depend on the choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from vtoken.eval.errors import unknown
from vtoken.eval.executors.accelerate import AccelerateExecutor
from vtoken.eval.executors.base import Executor
from vtoken.eval.executors.local import LocalExecutor
from vtoken.eval.executors.ray import RayExecutor

__all__ = ["Executor", "check_options", "get_executor", "names", "options"]

_EXECUTORS: dict[str, type[Executor]] = {
    "local": LocalExecutor,
    "accelerate": AccelerateExecutor,
    "ray": RayExecutor,
}


def names() -> list[str]:
    """Names of all executors."""
    return list(_EXECUTORS)


def options(name: str) -> list[str]:
    """Names of an executor's options.

    Raises
    ------
    EvalError
        For an unknown executor.
    """
    if name not in _EXECUTORS:
        raise unknown("executor", name, _EXECUTORS)
    return [field.name for field in dataclasses.fields(_EXECUTORS[name])]


def get_executor(name: str, **given: Any) -> Executor:
    """An executor by name.

    Parameters
    ----------
    name : str
        One of `names`.
    **given
        Its options; see the classes for their meaning.

    Raises
    ------
    EvalError
        For an unknown name or option, or an impossible value.
    MissingExtraError
        If the executor needs a package that is not installed.
    """
    check_options(name, given)
    return _EXECUTORS[name](**given)


def check_options(name: str, given: Iterable[str]) -> None:
    """Check the names of an executor's options.

    Raises
    ------
    EvalError
        For an unknown executor or option.
    """
    known = options(name)
    for option in given:
        if option not in known:
            raise unknown(f"{name} executor option", option, known)
