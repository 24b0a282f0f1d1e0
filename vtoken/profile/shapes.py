# SPDX-License-Identifier: Apache-2.0
"""Models from a configuration alone: time does not depend on the values of the weights."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

import torch
import yaml

import vtoken.configs

FOLDER = Path(vtoken.configs.__file__).parent / "shapes"


def list_shapes() -> list[str]:
    """Names of the shipped shapes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def shape_config(name: str) -> Any:
    """The configuration of a shipped shape, a ``config.json`` or its folder, or a hub id.

    Raises
    ------
    ValueError
        If there is no such shape or configuration.
    """
    from transformers import AutoConfig

    if name in list_shapes():
        spec = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
        return AutoConfig.for_model(spec["model_type"], **spec["config"])
    if "/" not in name and not Path(name).exists():
        near = difflib.get_close_matches(name, list_shapes(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(list_shapes())}."
        raise ValueError(f"Unknown shape {name!r}: {hint}")
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"The configuration {name!r} cannot be read: {str(error).splitlines()[0]}") from error


MARGIN = 0.8
"""Share of the free memory that weights may take where the depth is cut to fit: the rest is for the runs."""
LEAST = 4
"""Decoder layers below which a model says nothing about the whole one."""


def fitting_model(config: Any, *, device: str | torch.device, dtype: torch.dtype) -> tuple[Any, str]:
    """`random_model`, with as many decoder layers as there is memory for; and a sentence that says so, or "".

    Raises
    ------
    ValueError
        If not even `LEAST` layers fit.
    """
    device = torch.device(device)
    depth, free = config.get_text_config().num_hidden_layers, _free_bytes(device)
    need = _weight_bytes(config, dtype)
    if need <= MARGIN * free:
        return random_model(config, device=device, dtype=dtype), ""
    period = _period(config)
    least = min(-(-LEAST // period) * period, depth)
    each = (need - _weight_bytes(with_depth(config, least), dtype)) / max(depth - least, 1)
    fits = depth - int(-(-(need - MARGIN * free) // max(each, 1)))
    left = max(fits // period * period, least)
    note = (
        f"{left} of {depth} decoder layers, as the whole model takes {need / 2**30:.1f} GiB in "
        f"{str(dtype).removeprefix('torch.')} and {device} has {free / 2**30:.1f} GiB free"
    )
    return random_model(with_depth(config, left), device=device, dtype=dtype), note


def with_depth(config: Any, layers: int) -> Any:
    """The same configuration with the first ``layers`` of its decoder layers."""
    whole = config.to_dict()
    text = whole.get("text_config", whole)
    depth = text["num_hidden_layers"]
    for name, value in list(text.items()):
        if isinstance(value, list) and len(value) == depth:
            text[name] = value[:layers]
        elif name == "per_layer_config" and isinstance(value, dict):
            text[name] = {number: part for number, part in value.items() if int(number) < layers}
    text["num_hidden_layers"] = layers
    return type(config).from_dict(whole)


def _period(config: Any) -> int:
    """After how many decoder layers the pattern of their kinds starts anew; 1 if there is none."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or [""]
    return next(n for n in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % n] for i in range(len(kinds))))


def _weight_bytes(config: Any, dtype: torch.dtype) -> int:
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    return sum(parameter.numel() * parameter.element_size() for parameter in empty.parameters())


def random_model(config: Any, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A model of this configuration with random weights, made on the device it will run on.

    Raises
    ------
    ValueError
        If it does not fit.
    """
    from transformers import AutoModelForImageTextToText

    device = torch.device(device)
    need, free = _weight_bytes(config, dtype), _free_bytes(device)
    if need > free:
        raise ValueError(
            f"The weights take {need / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}, and {device} has "
            f"{free / 2**30:.1f} GiB free: take a smaller shape or dtype."
        )
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model.eval()


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on every system
        return float("inf")
