# SPDX-License-Identifier: Apache-2.0
"""Questions and answers, as a model is given them and gives them; it must not know lmms-eval."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vtoken.eval.model.fingerprints import picture_key, question_key
from vtoken.eval.model.preprocessing import Conversation


@dataclass(frozen=True)
class Question:
    """One document of a task, asked once.

    Parameters
    ----------
    task, split : str
    doc_id : int
    arguments : mapping
        The task's ``generation_kwargs``.
    read : callable
        Gives the document.
    converse : callable
        The conversation about a document.
    """

    task: str
    split: str
    doc_id: int
    arguments: Mapping[str, Any]
    read: Callable[[], Any]
    converse: Callable[[Any], Conversation]

    @property
    def kind(self) -> str:
        """Equal for questions with the same generation arguments: only those share a batch."""
        return json.dumps(self.arguments, sort_keys=True, default=str)

    def prepare(self) -> Prepared:
        """Read the document and decode its pictures."""
        document = self.read()
        found = Prepared(self, self.converse(document), document.get("evidence_boxes"))
        _ = found.key  # takes the pixels: images from files are decoded no earlier
        return found


@dataclass(frozen=True)
class Prepared:
    """A question with its pictures in memory.

    Parameters
    ----------
    conversation : list
        What is said, and the pictures or clips that are shown.
    evidence : sequence or None
        Where the answer is, see `vtoken.eval.model.evidence`.
    """

    question: Question
    conversation: Conversation
    evidence: Any

    @cached_property
    def key(self) -> str:
        """See `question_key`."""
        asked = self.question
        return question_key([asked.task, asked.split, asked.doc_id, asked.arguments], self.conversation)

    @cached_property
    def picture(self) -> str:
        """See `picture_key`."""
        return picture_key(self.conversation)


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Parameters
    ----------
    text : str
    counts : mapping
        Tokens in and out, see `vtoken.eval.harness.asked.SampleCounts`.
    prompt, picture : str
        `Prepared.key` and `Prepared.picture` of what it was asked.
    """

    text: str
    counts: Mapping[str, Any]
    prompt: str = ""
    picture: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for a log."""
        return dataclasses.asdict(self)


def batches(questions: Sequence[Question], size: int) -> Iterator[list[int]]:
    """Numbers of the questions of each batch: only those with the same generation arguments share one."""
    groups: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        groups.setdefault(question.kind, []).append(number)
    for group in groups.values():
        yield from (group[i : i + size] for i in range(0, len(group), size))
