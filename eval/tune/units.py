# SPDX-License-Identifier: Apache-2.0
"""Questions in the order in which they are asked: at random, picture by picture, in parts that grow.

Questions about one picture are not independent, so a unit of the statistics is a picture with its questions, and counts
with the mean of their scores. What the scores are is not known here.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vtoken.eval.harness.scores import PICTURE_KEYS
from vtoken.eval.harness.tasksource import TaskRef

PER_PICTURE = 4
"""Questions of a picture that are asked: further ones say little that is new."""
FIRST = 32
GROWTH = 1.5
"""Units of the first part, and how the number of units grows from one look at the answers to the next."""
Unit = tuple[int, ...]
"""Documents of a task that ask about one picture."""


@dataclass(frozen=True)
class Part(TaskRef):
    """Some documents of a task, a task by itself: the fingerprint is of the choice, too.

    Parameters
    ----------
    units : tuple of tuple of int
        The documents, by picture.
    """

    units: tuple[Unit, ...] = ()

    @classmethod
    def of(cls, task: TaskRef, units: Sequence[Unit]) -> Part:
        """These units of a task."""
        digest = hashlib.sha256(repr(units).encode()).hexdigest()[:16]
        return cls(task.name, task.version, f"{task.fingerprint}/{digest}", task.folder, tuple(units))

    @property
    def documents(self) -> list[int]:
        """Numbers of the documents in the whole task, in the order of asking."""
        return list(itertools.chain.from_iterable(self.units))

    def means(self, scores: Sequence[float]) -> np.ndarray:
        """Mean score of each unit, given those of `documents`."""
        ends = np.cumsum([len(unit) for unit in self.units])
        return np.array([part.mean() for part in np.split(np.asarray(scores, float), ends[:-1])])


def part_of(task: Any, part: Part) -> Any:
    """The lmms-eval task object cut down to a part; the whole one stays as it is."""
    found = copy.copy(task)
    split = task.config.test_split if task.has_test_docs() else task.config.validation_split
    found.dataset = {split: task.dataset[split].select(part.documents)}
    found.dataset_no_image = {split: task.dataset_no_image[split].select(part.documents)}
    found.task_docs = found.eval_docs  # what filters of answers see
    return found


def shuffled_units(task: Any, seed: int = 0) -> list[Unit]:
    """All pictures of a task in random order, each with up to `PER_PICTURE` of its questions.

    Parameters
    ----------
    task : lmms_eval.api.task.Task
        The whole task.
    seed : int
        Of the order.
    """
    by_picture: dict[str, list[int]] = {}
    for number, picture in enumerate(_pictures(task)):
        by_picture.setdefault(picture or f"document {number}", []).append(number)
    chance = random.Random(seed)
    units = [tuple(sorted(chance.sample(found, min(len(found), PER_PICTURE)))) for found in by_picture.values()]
    chance.shuffle(units)
    return units


def _pictures(task: Any) -> Iterator[str]:
    """What each document asks about: by its own name for it, else by its pixels; "" without a picture."""
    named = [key for key in PICTURE_KEYS if len(task.eval_docs_no_media) and key in task.eval_docs_no_media[0]]
    if named:
        yield from (str(doc[named[0]]) for doc in task.eval_docs_no_media)
        return
    from lmms_eval.protocol import ChatMessages

    from vtoken.eval.model.fingerprints import picture_key

    for doc in task.eval_docs:
        yield picture_key(ChatMessages(messages=task.doc_to_messages(doc)).to_hf_messages())


def within(units: Sequence[Unit], questions: int | None) -> list[Unit]:
    """The first units that together ask no more than so many questions."""
    if questions is None:
        return list(units)
    totals = itertools.accumulate(len(unit) for unit in units)
    return [unit for unit, total in zip(units, totals, strict=True) if total <= questions]


def looks(units: int) -> list[int]:
    """After how many units one looks at the answers."""
    found, size = [], float(FIRST)
    while size < units:
        found.append(round(size))
        size *= GROWTH
    return [*found, units]


def cut(units: Sequence[Unit], moments: Sequence[int], task: TaskRef) -> list[Part]:
    """What is asked between one look and the next."""
    return [Part.of(task, units[start:end]) for start, end in itertools.pairwise((0, *moments))]
