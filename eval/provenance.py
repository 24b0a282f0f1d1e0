# SPDX-License-Identifier: Apache-2.0
"""What a result was made with: versions, code and device."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import platform
from pathlib import Path
from typing import Any

import vtoken
from vtoken.reducers.base import Reducer

PACKAGES = ("torch", "transformers", "lmms-eval")
_NO_CODE = ("cli", "mini", "profile.py")  # no score depends on them; weights and questions are pinned by themselves
_ANSWERING = ("model.py", "generation.py", "harness.py")  # of this package


@functools.cache
def versions() -> dict[str, str]:
    """Versions that decide about a score."""
    found = {name: _version(name) for name in PACKAGES}
    return {"vtoken": vtoken.__version__, "vtoken code": code_digest(), **found}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@functools.cache
def code_digest() -> str:
    """Hash of what computes: an edited reducer must never be served the answers of its former self."""
    import vtoken.adapters

    digest = hashlib.sha256()
    for root in (Path(vtoken.__file__).parent, Path(vtoken.adapters.__file__).parent):
        for path in sorted(root.rglob("*.py")):
            if path.relative_to(root).parts[0] not in _NO_CODE:
                digest.update(path.read_bytes())
    for name in _ANSWERING:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:16]


def foreign_code(reducer: Reducer | None) -> str:
    """Hash of the module that defines a reducer from outside of the package, "" for ours."""
    module = inspect.getmodule(type(reducer))
    if reducer is None or module is None or module.__name__.split(".")[0] == "vtoken":
        return ""
    try:
        return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()[:16]
    except OSError:  # typed into an interpreter
        return ""


def surroundings() -> dict[str, Any]:
    """Machine and software, for the record only."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        **versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }
