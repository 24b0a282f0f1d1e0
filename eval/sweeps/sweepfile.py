# SPDX-License-Identifier: Apache-2.0
"""Sweep files as text: reading them, resolving their paths, and what is wrong with them in one sentence."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from vtoken import mini
from vtoken.eval.errors import EvalError, unknown
from vtoken.eval.harness.tasksource import is_folder

Schema = TypeVar("Schema", bound=BaseModel)


def read_mapping(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    """The mapping in a YAML file; ``keys`` are named if there is none.

    Raises
    ------
    EvalError
        If the file cannot be read or holds something else.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvalError(f"The sweep file {str(path)!r} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise EvalError(f"The sweep file {str(path)!r} cannot be read: it is no UTF-8 text.") from None
    except yaml.YAMLError as error:
        raise EvalError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, Mapping):
        raise EvalError(f"{path} must hold a mapping with the keys {', '.join(keys)}.")
    return {str(key): value for key, value in found.items()}


def anchored(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The same data with relative paths of models, reducers, tasks and results made to start at ``folder``."""
    found = dict(data)
    for key, anchor in (("models", _model), ("reducers", _reducer), ("tasks", _task)):
        if isinstance(found.get(key), list):
            found[key] = [anchor(entry, folder) for entry in found[key]]
    if isinstance(found.get("out"), str):
        found["out"] = str(folder / found["out"])
    return found


def _model(entry: Any, folder: Path) -> Any:
    if isinstance(entry, Mapping) and "pretrained" in entry:
        return {**entry, "pretrained": _model(entry["pretrained"], folder)}
    if not isinstance(entry, str) or entry in mini.names():
        return entry
    return str(folder / entry) if entry.startswith(".") or (folder / entry).is_dir() else entry


def _reducer(entry: Any, folder: Path) -> Any:
    if isinstance(entry, Mapping) and isinstance(entry.get("stages"), list):
        return {**entry, "stages": [_reducer(stage, folder) for stage in entry["stages"]]}
    return str(folder / entry) if isinstance(entry, str) and entry.endswith((".yaml", ".yml")) else entry


def _task(entry: Any, folder: Path) -> Any:
    if isinstance(entry, Mapping) and isinstance(entry.get("folder"), str):
        return {**entry, "folder": str(folder / entry["folder"])}
    return str(folder / entry) if isinstance(entry, str) and is_folder(entry) else entry


def checked(schema: type[Schema], data: Mapping[str, Any], path: Path, overridden: Container[str] = ()) -> Schema:
    """Validate what a file holds.

    Parameters
    ----------
    schema : type
        A pydantic model.
    data : mapping
        By key.
    path : Path
        The file, named in errors.
    overridden : container of str
        Keys that do not come from the file.

    Raises
    ------
    EvalError
        The first thing that is wrong, in a sentence.
    """
    try:
        return schema(**data)
    except ValidationError as error:
        records = error.errors()
        first = next((record for record in records if record["type"] == "extra_forbidden"), records[0])
        where = "" if first["loc"] and first["loc"][0] in overridden else f"{path}: "
        raise EvalError(where + _sentence(first, schema)) from None


def _sentence(record: Any, schema: type[BaseModel]) -> str:
    """One of pydantic's error records in words."""
    *outer, last = record["loc"]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in record["loc"]).removeprefix(".")
    if record["type"] == "extra_forbidden":
        place = key.removesuffix(f".{last}") + ": " if outer else ""
        return place + str(unknown("key", str(last), _keys(schema, outer)))
    if record["type"] == "missing":
        return f"the key {key!r} is missing."
    if record["type"] == "value_error":  # a sentence of ours
        return f"{key}: {record['ctx']['error']}"
    return f"{key}={record['input']!r} is not possible: {record['msg'][0].lower()}{record['msg'][1:]}."


def _keys(schema: type[BaseModel], loc: Iterable[Any]) -> list[str]:
    """The keys that are known at a place of the file."""
    for part in loc:
        if isinstance(part, str):
            annotation = schema.model_fields[part].annotation
            schema = next(t for t in get_args(annotation) if isinstance(t, type) and issubclass(t, BaseModel))
    return list(schema.model_fields)
