# SPDX-License-Identifier: Apache-2.0
"""Where lmms-eval and vtoken meet: its requests become questions, our answers its results. Knows no model.

Importing this file imports lmms-eval: call `vtoken.eval.harness.driver.load_harness` first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

from vtoken.eval.model.questions import Answer, Question

Answering = Callable[[Sequence[Question]], Sequence[Answer | None]]


@dataclass
class SampleCounts(TokenCounts):
    """lmms-eval's token counts with ours: its evaluator writes what `to_dict` returns into every sample.

    Parameters
    ----------
    visual_tokens, visual_kept, visual_per_layer : optional
        See `vtoken.eval.model.counts.Visual`.
    evidence_recall : float, optional
        See `vtoken.eval.model.evidence`.
    """

    visual_tokens: int | None = None
    visual_kept: int | None = None
    visual_per_layer: float | None = None
    evidence_recall: float | None = None

    def to_dict(self) -> dict[str, int | float]:
        """All counts that are known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Asked(lmms):
    """What lmms-eval asks: hands its requests on as questions, and keeps the answers.

    Parameters
    ----------
    answering : callable
        Answers questions, in their order; None for documents that are left out.
    leave_out : callable
        Told their numbers: lmms-eval must not score them.

    Attributes
    ----------
    answers : dict
        By document; the first where a task asks about one several times.
    """

    is_simple = False

    def __init__(self, answering: Answering, leave_out: Callable[[set[int]], None] = lambda doc_ids: None) -> None:
        super().__init__()
        self._answering, self._leave_out = answering, leave_out
        self.answers: dict[int, Answer] = {}

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer all requests, in their order; any failure is raised."""
        questions = [question_of(request, self.task_dict) for request in requests]
        found = self._answering(questions)
        if broken := {question.doc_id for question, answer in zip(questions, found, strict=True) if answer is None}:
            self._leave_out(broken)
        for question, answer in zip(questions, found, strict=True):
            if answer is not None:
                self.answers.setdefault(question.doc_id, answer)
        return [_result(answer or Answer("", {})) for answer in found]

    def clean(self) -> None:
        """Keep the model: lmms-eval would delete it at the end of every evaluation."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not offered."""
        raise NotImplementedError("The vtoken model answers by generation only: choose a generate_until task.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("The vtoken model answers single questions only: choose a generate_until task.")


def _result(answer: Answer) -> GenerationResult:
    return GenerationResult(answer.text, SampleCounts(**answer.counts))


def question_of(request: Instance, tasks: Mapping[str, Mapping[str, Sequence]]) -> Question:
    """A request of lmms-eval's as a question; documents are read, and pictures decoded, when they are needed."""
    _, to_messages, arguments, doc_id, task, split = request.args
    return Question(
        task=task,
        split=split,
        doc_id=doc_id,
        arguments=arguments,
        read=lambda: tasks[task][split][doc_id],
        converse=lambda document: ChatMessages(messages=to_messages(document)).to_hf_messages(),
    )
