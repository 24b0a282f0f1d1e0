# SPDX-License-Identifier: Apache-2.0
"""``--model_args`` of the lmms-eval plug-in: what belongs to the model, to generation, to the reducer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import yaml

from vtoken import get_reducer
from vtoken.eval.errors import EvalError, unknown
from vtoken.eval.model.loading import ModelSpec
from vtoken.reducers.base import Reducer

MODEL = tuple(field.name for field in dataclasses.fields(ModelSpec))
OWN = ("reducer", "batch_size", "max_new_tokens")
UNPRUNED = ("none", "unpruned")


def split_arguments(arguments: Mapping[str, Any]) -> tuple[ModelSpec, Reducer | None]:
    """Read model and reducer from flat arguments; every name must belong to one of them.

    Raises
    ------
    EvalError, ValueError
        For an unknown name or an impossible value, as a sentence.
    """
    model = {name: value for name, value in arguments.items() if name in MODEL and value is not None}
    params = {name: value for name, value in arguments.items() if name not in (*MODEL, *OWN)}
    if "pretrained" not in model:
        raise EvalError(
            "The model is missing: pass pretrained=..., a hub id, a folder or the name of an embedded model."
        )
    reducer = read_reducer(arguments.get("reducer"))
    fields = [f.name for f in dataclasses.fields(reducer) if f.init] if reducer else []
    for name in params:
        if name not in fields:
            raise unknown("argument", name, [*MODEL, *OWN, *fields])
    return ModelSpec(**{k: str(v) for k, v in model.items()}), get_reducer(reducer, **params) if reducer else None


def read_reducer(spec: Any) -> Reducer | None:
    """A reducer from a name, a preset, a YAML file or an inline mapping such as ``{reducer: fopru, keep: 0.5}``."""
    if spec is None or spec in UNPRUNED:
        return None
    if isinstance(spec, str) and spec.lstrip().startswith("{"):
        spec = yaml.safe_load(spec)
    return get_reducer(spec)


def positive_int(name: str, value: Any) -> int:
    """``value`` as an int of at least 1, or a sentence."""
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or (isinstance(value, float) and value != number):
        raise EvalError(f"{name}={value!r} is not possible: give an integer of at least 1.")
    return number
