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


def random_model(config: Any, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A model of this configuration with random weights, made on the device it will run on.

    Raises
    ------
    ValueError
        If it does not fit.
    """
    from transformers import AutoModelForImageTextToText

    device = torch.device(device)
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    need, free = sum(p.numel() * p.element_size() for p in empty.parameters()), _free_bytes(device)
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
