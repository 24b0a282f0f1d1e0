# SPDX-License-Identifier: Apache-2.0
"""What a result was made with: versions, code and device."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
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
_ELSEWHERE = ("adapters", "configs", "eval")
"""Packages in ``vtoken`` whose folders are beside it in a checkout."""
_SUFFIXES = (".py", ".yaml")
NO_SCORE = {
    "cli": "reads options and shows results",
    "configs": "presets and sweeps: a cell holds the parameters that they stand for",
    "doctor": "checks models, runs no cell",
    "drawing.py": "pictures of what was kept",
    "eval/comparison": "reads the answers of finished cells",
    "eval/report": "shows them",
    "eval/show": "shows what reducers keep",
    "mini/learned": "trained parts, which cells pin by their content",
    "mini/training": "makes weights, which cells pin by their content",
    "mini/weights": "weights",
    "profile": "measures cost, apart from answers",
    "training": "makes trained parts",
}
"""What no score depends on, and why: the only parts of the package that `code_digest` leaves out."""


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
    return digest_of(code_files())


def code_files() -> dict[str, Path]:
    """The code and task definitions of this package but for `NO_SCORE`, by their places in it.

    Names and contents are the same in a checkout (where `_ELSEWHERE` are other folders), a wheel and on a worker.
    """
    found: dict[str, Path] = {}
    for package in ("", *_ELSEWHERE):
        spec = importlib.util.find_spec(f"vtoken.{package}".removesuffix("."))
        for root in map(Path, (spec.submodule_search_locations if spec else None) or ()):
            inside = (path.relative_to(root) for path in root.rglob("*") if path.suffix in _SUFFIXES)
            found |= {Path(package, path).as_posix(): root / path for path in inside if not _is_hidden(path)}
    return {name: found[name] for name in sorted(found) if not _has_no_score(name)}


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)  # of editors and notebooks


def _has_no_score(name: str) -> bool:
    return any(name == left_out or name.startswith(f"{left_out}/") for left_out in NO_SCORE)


def digest_of(files: Mapping[str, Path]) -> str:
    """Hash over names and contents."""
    digest = hashlib.sha256()
    for name in sorted(files):
        content = files[name].read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def foreign_code(reducer: Reducer | None) -> str:
    """Hash of the modules that define a reducer, or stages of a chain, from outside of the package, "" for ours."""
    if reducer is None:
        return ""
    codes = (_code(stage) for stage in getattr(reducer, "reducers", (reducer,)))
    return ",".join(code for code in codes if code)


def _code(reducer: Reducer) -> str:
    module = inspect.getmodule(type(reducer))
    if module is None or module.__name__.split(".")[0] == "vtoken":
        return ""
    try:
        return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()[:16]
    except OSError:  # of an interpreter's prompt
        return "unknown"


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
