# SPDX-License-Identifier: Apache-2.0
"""Small trained parts (gates, scorers) as files: found by path or by the embedded model they were made for."""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class Checkpoint(NamedTuple):
    """Tensors by name, and what the file says about them ({} for a PyTorch file)."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def load(source: str, what: str) -> Checkpoint:
    """Read a checkpoint, once for each version of the file.

    Parameters
    ----------
    source : str
        A ``.safetensors`` file, a PyTorch file of tensors, or the name of an embedded model that has one.
    what : str
        The part, ``"gate"`` or ``"scorer"``.

    Raises
    ------
    ValueError
        If there is no such file, or it is damaged.
    """
    path = path_of(source, what)
    if not path.is_file():
        raise ValueError(f"There is no {what} checkpoint {source!r}: make one with 'vtoken train-{what} --out {path}'.")
    return _read(path, path.stat().st_mtime_ns, what)


def path_of(source: str, what: str) -> Path:
    """The file that `load` reads."""
    from vtoken.mini import learned, names

    return learned(source, what) if source in names() else Path(source)


@functools.lru_cache(maxsize=4)
def _read(path: Path, _changed: int, what: str) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                names = file.keys()
                return Checkpoint({name: file.get_tensor(name) for name in names}, file.metadata() or {})
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(
            f"The {what} checkpoint {str(path)!r} cannot be read ({str(error).splitlines()[0][:80]}): it is damaged or "
            "of another kind; give a .safetensors file, or a PyTorch file that holds tensors only."
        ) from None
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(
            f"The {what} checkpoint {str(path)!r} holds no mapping of names to tensors: give another file."
        )
    return Checkpoint({str(name): value for name, value in found.items()}, {})


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """Write a ``.safetensors`` file, moved into place when it is complete.

    Raises
    ------
    OSError
        If the folder cannot be made or written to.
    """
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    found = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(found, part, {name: str(value) for name, value in metadata.items()})
    os.replace(part, path)
