# SPDX-License-Identifier: Apache-2.0
"""Held-out questions for the embedded models: generated once, kept in the user's cache, checked on every use."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vtoken.mini import documents, world
from vtoken.mini.documents import held_out
from vtoken.mini.questions import KINDS, Question
from vtoken.mini.world import Split, render, sample_scene

log = logging.getLogger(__name__)

MIXED = "mini"
PER_KIND = 250  # of the mixed task
PER_TASK = 500
PER_SCENE = 4  # several questions a picture, as real benchmarks ask them
LAYOUT = 3  # of the files; raise it when their columns change
QUESTIONS, PICTURES, MANIFEST = "questions.parquet", "pictures.parquet", "manifest.json"


@dataclass(frozen=True)
class MiniData:
    """What a task asks.

    Parameters
    ----------
    questions : list of dict
        ``kind``, ``text``, ``answer``, ``pictures`` (indices), ``evidence_boxes`` (for each of them the boxes that
        the answer depends on) and ``video`` (whether the pictures are the frames of a clip), in a fixed order.
    pictures : list of bytes
        PNG files.
    fingerprint : str
        Hash of all content.
    """

    questions: list[dict[str, Any]]
    pictures: list[bytes]
    fingerprint: str


def generate(name: str, per_kind: int = PER_KIND, per_task: int = PER_TASK) -> MiniData:
    """Draw the pictures of a task and ask."""
    return _mixed(per_kind) if name == MIXED else _documents(name, per_task)


def _mixed(per_kind: int) -> MiniData:
    """Every kind of question on square scenes, interleaved, one of each in turn, so that any prefix is balanced."""
    asked: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    pictures: list[bytes] = []
    digest = hashlib.sha256()
    for number in range(100 * per_kind):
        if all(len(found) >= per_kind for found in asked.values()):
            break
        rng = np.random.default_rng([Split.TEST, number])
        scene = sample_scene(rng, held_out=True)
        pixels = render(scene, rng)
        questions: list[Question] = []
        for kind in sorted(asked, key=lambda k: len(asked[k])):  # the rarest kinds first
            if len(questions) < PER_SCENE and len(asked[kind]) < per_kind and (q := KINDS[kind](scene, rng)):
                questions.append(q)
        for q in questions:
            asked[q.kind].append(_row(q.kind, q.text, q.answer, [len(pictures)], [q.evidence]))
        digest.update(pixels.tobytes())
        pictures.append(_png(pixels))
    interleaved = [q for turn in zip(*asked.values(), strict=True) for q in turn]
    digest.update(json.dumps(interleaved, sort_keys=True).encode())
    return MiniData(interleaved, pictures, digest.hexdigest())


def _documents(name: str, count: int) -> MiniData:
    """The held-out documents of `vtoken.mini.documents`, each with pictures of its own."""
    questions: list[dict[str, Any]] = []
    pictures: list[bytes] = []
    digest = hashlib.sha256()
    for document in held_out(name, count):
        numbers = [len(pictures) + i for i in range(len(document.images))]
        row = _row(document.kind, document.question, document.answer, numbers, document.evidence, document.video)
        questions.append(row)
        pictures += [_png(image) for image in document.images]
        for image in document.images:
            digest.update(image.tobytes())
    digest.update(json.dumps(questions, sort_keys=True).encode())
    return MiniData(questions, pictures, digest.hexdigest())


def _row(
    kind: str, text: str, answer: str, pictures: list[int], evidence: Iterable[Iterable[Any]], video: bool = False
) -> dict[str, Any]:
    boxes = [[[round(float(x), 2) for x in box] for box in found] for found in evidence]
    return {"kind": kind, "text": text, "answer": answer, "pictures": pictures, "evidence_boxes": boxes, "video": video}


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)  # noise does not compress: do not try hard
    return file.getvalue()


def version(name: str) -> int:
    """Version of a task's content: any change of its generator raises it."""
    return world.VERSION if name == MIXED else documents.VERSION


def cache_folder(name: str) -> Path:
    """Where the files of this version of the generator are kept."""
    return Path(platformdirs.user_cache_dir("vtoken")) / f"{name}-v{version(name)}.{LAYOUT}"


@functools.cache
def load_data(name: str = MIXED, folder: Path | None = None) -> MiniData:
    """The questions of a task, from the cache where it is intact, else generated anew.

    Parameters
    ----------
    name : str
        ``"mini"``, or one of `vtoken.mini.documents.TASKS`.
    folder : Path, optional
        Cache folder; `cache_folder` by default.
    """
    folder = folder or cache_folder(name)
    if (found := _read(folder)) is not None:
        return found
    data = generate(name)
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
