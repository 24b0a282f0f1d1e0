# SPDX-License-Identifier: Apache-2.0
"""Held-out questions for the embedded models: generated once, kept in the user's cache, checked on every use."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vtoken.mini.questions import KINDS, Question
from vtoken.mini.world import VERSION, Split, render, sample_scene

log = logging.getLogger(__name__)

PER_KIND = 250
PER_SCENE = 4  # several questions a picture, as real benchmarks ask them
LAYOUT = 1  # of the files; raise it when their columns change
QUESTIONS, PICTURES, MANIFEST = "questions.parquet", "pictures.parquet", "manifest.json"


@dataclass(frozen=True)
class MiniData:
    """Questions (kind, text, answer, evidence, scene) in a fixed order, PNG pictures by scene, a content hash."""

    questions: list[dict[str, Any]]
    pictures: list[bytes]
    fingerprint: str


def generate(per_kind: int = PER_KIND, per_scene: int = PER_SCENE) -> MiniData:
    """Draw scenes and ask until every kind has ``per_kind`` questions.

    Questions come interleaved, one of each kind in turn, so that any prefix is balanced.
    """
    asked: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    pictures: list[bytes] = []
    digest = hashlib.sha256()
    for number in range(100 * per_kind):
        if all(len(found) >= per_kind for found in asked.values()):
            break
        rng = np.random.default_rng([Split.TEST, number])
        scene = sample_scene(rng, held_out=True)
        pixels = render(scene, rng)
        questions: list[dict[str, Any]] = []
        for kind in sorted(asked, key=lambda k: len(asked[k])):  # the rarest kinds first
            if len(questions) < per_scene and len(asked[kind]) < per_kind and (q := KINDS[kind](scene, rng)):
                questions.append(_row(q, len(pictures)))
        for question in questions:
            asked[question["kind"]].append(question)
        digest.update(pixels.tobytes())
        pictures.append(_png(pixels))
    interleaved = [q for turn in zip(*asked.values(), strict=True) for q in turn]
    digest.update(json.dumps(interleaved, sort_keys=True).encode())
    return MiniData(interleaved, pictures, digest.hexdigest())


def _row(question: Question, scene: int) -> dict[str, Any]:
    boxes = [[round(x, 2) for x in box] for box in question.evidence]
    return {
        "kind": question.kind,
        "text": question.text,
        "answer": question.answer,
        "evidence": boxes,
        "scene": scene,
    }


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)  # noise does not compress: do not try hard
    return file.getvalue()


def cache_folder() -> Path:
    """Where the files of this version of the generator are kept."""
    return Path(platformdirs.user_cache_dir("vtoken")) / f"mini-v{VERSION}.{LAYOUT}"


@functools.cache
def load_data(folder: Path | None = None) -> MiniData:
    """The questions, from the cache where it is intact, else generated anew.

    Parameters
    ----------
    folder : Path, optional
        Cache folder; `cache_folder` by default.
    """
    folder = folder or cache_folder()
    if (found := _read(folder)) is not None:
        return found
    data = generate()
    try:
        _write(folder, data)
    except OSError as error:
        log.warning("The questions cannot be kept in %s (%s): they are generated again next time.", folder, error)
    return data


def _digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (QUESTIONS, PICTURES)}


def _read(folder: Path) -> MiniData | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["files"] != _digests(folder):
            log.warning("The questions in %s are damaged: they are generated again.", folder)
            return None
        pictures = pq.read_table(folder / PICTURES)["png"].to_pylist()
        return MiniData(pq.read_table(folder / QUESTIONS).to_pylist(), pictures, manifest["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):  # nothing there yet, or not ours
        return None


def _write(folder: Path, data: MiniData) -> None:
    """File by file, each moved into place when it is complete; the manifest, which makes them valid, comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = {QUESTIONS: pa.Table.from_pylist(data.questions), PICTURES: pa.table({"png": data.pictures})}
    for name, table in columns.items():
        part = folder / f".{name}.{os.getpid()}"
        pq.write_table(table, part)
        os.replace(part, folder / name)
    part = folder / f".{MANIFEST}.{os.getpid()}"
    part.write_text(json.dumps({"fingerprint": data.fingerprint, "files": _digests(folder)}, indent=1))
    os.replace(part, folder / MANIFEST)
