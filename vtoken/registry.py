# SPDX-License-Identifier: Apache-2.0
"""Names of reducers: ``@register`` them, list them, build them from strings, mappings and YAML presets."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from vtoken.reducers.base import Reducer

_REDUCERS: dict[str, type[Reducer]] = {}
_Class = TypeVar("_Class", bound="type[Reducer]")


def register(name: str):
    """Class decorator: make a reducer known as ``name``.

    Raises
    ------
    ValueError
        If the name is taken by another class.
    """

    def decorate(cls: _Class) -> _Class:
        if name in _REDUCERS and _REDUCERS[name].__qualname__ != cls.__qualname__:
            raise ValueError(f"The reducer name {name!r} is taken by {_REDUCERS[name].__name__}: choose another.")
        cls.name = name
        _REDUCERS[name] = cls
        return cls

    return decorate


def _known() -> dict[str, type[Reducer]]:
    """All registered reducers; those of the package register when it is imported, which takes torch."""
    importlib.import_module("vtoken.reducers")
    return _REDUCERS


def list_reducers(pattern: str = "*") -> list[str]:
    """Names of the registered reducers that match a shell pattern, sorted.

    >>> "random" in list_reducers("ran*")
    True
    """
    return sorted(fnmatch.filter(_known(), pattern))


def reducer_class(name: str) -> type[Reducer]:
    """The class behind a name.

    Raises
    ------
    ValueError
        For an unknown name, with the nearest known ones.
    """
    known = _known()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(list_reducers())}."
        raise ValueError(f"Unknown reducer {name!r}: {hint}")
    return known[name]


def _build(name: str, params: Mapping[str, Any]) -> Reducer:
    cls = reducer_class(name)
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    for key in params:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known) or 'no parameters'}."
            raise ValueError(f"Unknown parameter {key!r} of reducer {name!r}: {hint}")
    return cls(**params)


def _from_mapping(spec: Mapping[str, Any], params: Mapping[str, Any]) -> Reducer:
    spec = dict(spec)
    if "reducer" not in spec:
        raise ValueError(f"A reducer mapping needs the key 'reducer', got {sorted(spec)}: write reducer: fopru.")
    name = spec.pop("reducer")
    if name == "chain":
        from vtoken.reducers.chain import Chain

        stages = [get_reducer(stage) for stage in spec.pop("stages", [])]
        given = {**spec, **params}
        repair = given.pop("repair", False)
        if given:
            raise ValueError(f"Unknown parameter {sorted(given)[0]!r} of a chain: it takes stages and repair.")
        return Chain(stages, repair=repair)
    return _build(name, {**spec, **params})


def get_reducer(spec: str | Mapping[str, Any] | Path | Reducer, **params: Any) -> Reducer:
    """Build a reducer.

    Parameters
    ----------
    spec : str, mapping, Path or Reducer
        A registered name (``"fopru"``), the name of a shipped preset (``"fopru-row"``), a mapping with the key
        ``reducer`` and its parameters, the path of a YAML file that holds such a mapping, or a reducer (returned as
        it is, with ``params`` replaced).
    **params
        Parameters of the reducer; they win over those of the spec.

    Raises
    ------
    ValueError
        If the name or a parameter is unknown, or a value is out of range.
    """
    from vtoken.reducers.base import Reducer

    if isinstance(spec, Reducer):
        return dataclasses.replace(spec, **params) if params else spec
    if isinstance(spec, Mapping):
        return _from_mapping(spec, params)
    if isinstance(spec, Path) or str(spec).endswith((".yaml", ".yml")):
        return _from_mapping(_read_yaml(Path(spec)), params)
    if spec not in _known() and (preset := preset_path(spec)):
        return _from_mapping(_read_yaml(preset), params)
    return _build(spec, params)


def preset_path(name: str) -> Path | None:
    """The shipped YAML preset of that name, if there is one."""
    import vtoken.configs

    path = Path(vtoken.configs.__path__[0]) / "reducers" / f"{name}.yaml"
    return path if path.is_file() else None


def list_presets() -> list[str]:
    """Names of the shipped reducer presets, sorted."""
    import vtoken.configs

    return sorted(path.stem for path in (Path(vtoken.configs.__path__[0]) / "reducers").glob("*.yaml"))


def _read_yaml(path: Path) -> Mapping[str, Any]:
    import yaml

    if not path.is_file():
        raise ValueError(f"There is no reducer file {str(path)!r}: give a YAML file with the key 'reducer'.")
    try:
        found = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} must hold a mapping with the key 'reducer', not {type(found).__name__}.")
    return found
