# SPDX-License-Identifier: Apache-2.0
"""Reducers of a sweep file: parameter grids, own budgets and chains, expanded into single reducers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vtoken.budget import Keep, check_keep
from vtoken.eval.errors import EvalError
from vtoken.eval.model.arguments import read_reducer
from vtoken.eval.sweeps.cells import with_keeps
from vtoken.reducers.base import Reducer
from vtoken.reducers.chain import Chain
from vtoken.registry import get_reducer

_OWN = ("reducer", "grid", "keep", "stages")


class Point(NamedTuple):
    """A reducer, and whether its budget was given with it."""

    reducer: Reducer
    has_keep: bool


def expand(spec: Any, seed: int = 0) -> list[Point]:
    """All reducers that one entry of a sweep stands for; none for the unpruned model.

    Parameters
    ----------
    spec : str or mapping
        A name, a preset, a YAML file, or a mapping: ``reducer`` (a name or a preset) and its parameters. ``grid`` maps
        parameters to lists of values, of which all combinations are made; ``keep`` may be a list too. A chain has
        ``stages``, each an entry like this one.
    seed : int
        Of reducers that draw at random and are given none of their own.

    Raises
    ------
    EvalError, ValueError
        For an unknown name or parameter, or an impossible value.
    """
    if isinstance(spec, Mapping):
        own = "keep" in spec or "keep" in _grid(spec)
        return [Point(reducer, own) for reducer in _combinations(spec, seed)]
    if not isinstance(spec, str):
        raise EvalError(f"{spec!r} is no reducer: give a name, a preset, a YAML file or {{reducer: NAME, ...}}.")
    reducer = read_reducer(spec)
    return [] if reducer is None else [Point(_with_seed(reducer, seed), False)]


def points(specs: Sequence[Any], keeps: Sequence[Keep] = (), seed: int = 0) -> list[Reducer | None]:
    """Every reducer at every budget, the unpruned model first.

    A reducer that comes with a budget is run at that one alone; without ``keeps``, each at its default.
    """
    found: list[Reducer | None] = [None]
    for spec in specs:
        for reducer, has_keep in expand(spec, seed):
            found += [reducer] if has_keep or not keeps else with_keeps(reducer, keeps)
    return found


def _combinations(spec: Mapping[str, Any], seed: int) -> list[Reducer]:
    axes: dict[str, list[Any]] = {str(name): [value] for name, value in spec.items() if name not in _OWN}
    for name, values in _grid(spec).items():
        if name in spec:
            raise EvalError(f"The parameter {name!r} of {spec.get('reducer')!r} is given twice: keep it in grid alone.")
        axes[name] = values
    if "keep" in spec:
        axes["keep"] = [check_keep(keep) for keep in _as_list("keep", spec["keep"])]
    if "stages" in spec:
        stages = [[point.reducer for point in expand(stage, seed)] for stage in _as_list("stages", spec["stages"])]
        axes["stages"] = [list(chosen) for chosen in itertools.product(*stages)]
    found = [_build(spec, dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
    return found if "seed" in axes else [_with_seed(reducer, seed) for reducer in found]


def _grid(spec: Mapping[str, Any]) -> dict[str, list[Any]]:
    grid = spec.get("grid", {})
    if not isinstance(grid, Mapping):
        raise EvalError(f"grid={grid!r} is not possible: map parameters to lists of values, grid: {{lam: [0.3, 0.5]}}.")
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise EvalError(f"grid.{name}={values!r} is not possible: give a list of at least one value.")
    return {str(name): values for name, values in grid.items()}


def _as_list(name: str, value: Any) -> list[Any]:
    found = value if isinstance(value, list) else [value]
    if not found:
        raise EvalError(f"{name}=[] is not possible: give at least one.")
    return found


def _build(spec: Mapping[str, Any], params: dict[str, Any]) -> Reducer:
    if isinstance(name := spec.get("reducer"), str) and name != Chain.name:
        return get_reducer(name, **params)  # a name or a preset
    return get_reducer({**({"reducer": name} if name else {}), **params})


def _with_seed(reducer: Reducer, seed: int) -> Reducer:
    """The reducer drawing with ``seed``, unless it does not draw or a preset says how."""
    default = next((field.default for field in dataclasses.fields(reducer) if field.name == "seed"), None)
    changes: dict[str, Any] = {"seed": seed}
    return dataclasses.replace(reducer, **changes) if getattr(reducer, "seed", ()) == default else reducer
