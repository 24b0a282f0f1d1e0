# SPDX-License-Identifier: Apache-2.0
"""What a result was made with: versions, code and device."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vtoken

if TYPE_CHECKING:
    from vtoken.reducers.base import Reducer

PACKAGES = ("torch", "transformers", "lmms-eval")
_NO_CODE = ("cli", "mini", "profile")  # no score depends on them; weights and questions are pinned by themselves
_ANSWERING = (
    "harness/driver.py",
    "model/generation.py",
    "model/preprocessing.py",
    "model/reduced.py",
)


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
        digest.update((Path(__file__).parent / name).read_bytes())
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


def files_digest(reducer: Reducer | None) -> str:
    """Hash over the trained parts that a reducer reads, "" for none; a file that is not there has no content."""
    contents = [path.read_bytes() if path.is_file() else b"" for path in reducer.files()] if reducer else []
    return hashlib.sha256(b"".join(contents)).hexdigest()[:16] if contents else ""


def folder_digest(root: Path, paths: Iterable[Path]) -> str:
    """sha256 over the names, relative to ``root``, and the contents of files in it."""
    digest = hashlib.sha256()
    for path in sorted(set(paths)):
        digest.update(path.relative_to(root).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def prompts_digest(samples: Iterable[Mapping[str, Any]]) -> str:
    """Hash over everything that was asked: prompts, pixels and generation arguments, in order."""
    return hashlib.sha256("\n".join(sample["prompt"] for sample in samples).encode()).hexdigest()[:16]


@functools.cache
def surroundings() -> dict[str, Any]:
    """Machine and software, for the record only."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        **versions(),
        "vtoken commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "gpu": gpu,
        "gpus": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "threads": torch.get_num_threads(),
    }


def commit() -> str | None:
    """The git commit of this code, ``-dirty`` if it was changed since; None where it is not known."""
    installed = importlib.metadata.distribution("vtoken").read_text("direct_url.json")
    if found := json.loads(installed or "{}").get("vcs_info", {}).get("commit_id"):
        return str(found)  # installed by pip from a repository
    here = Path(__file__).parent
    if (
        _output("git", "-C", str(here), "ls-files", Path(__file__).name) is None
    ):  # installed inside somebody's repository
        return None
    return _output("git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _output(*command: str) -> str | None:
    """First line that a program prints; None if there is none, or no such program."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)
