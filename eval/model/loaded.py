# SPDX-License-Identifier: Apache-2.0
"""A loaded model that answers questions under any reducer: batched, greedy, and loud when something breaks.

It remembers nothing of a call: reducer, log and listener come with the questions. It must not know lmms-eval.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

import vtoken
from vtoken.eval.errors import DocumentError, EvalError
from vtoken.eval.model.counts import Visual, count_pruned, count_unpruned, visual_token_ids
from vtoken.eval.model.evidence import Boxes, EvidenceReader
from vtoken.eval.model.generation import cut_at, generation_options
from vtoken.eval.model.loading import ModelSpec, load_model
from vtoken.eval.model.preprocessing import Conversation, media, preprocessing
from vtoken.eval.model.questions import Answer, Prepared, Question, batches
from vtoken.eval.store.samplelog import SampleLog
from vtoken.reducers.base import Reducer


def refuse(error: DocumentError) -> None:
    """What to do about a document that cannot be read: give up."""
    raise error


class LoadedModel:
    """A vision-language model, unpruned between calls.

    Parameters
    ----------
    spec : ModelSpec
        What to load.
    max_new_tokens : int, optional
        Wins over the task's.
    """

    def __init__(self, spec: ModelSpec, max_new_tokens: int | None = None) -> None:
        self.spec, self.max_new_tokens = spec, max_new_tokens
        self.model, self.processor = load_model(spec)
        self.preprocessing = preprocessing(spec.preprocessing, self.model.config.model_type)
        self._evidence = EvidenceReader(self.model)

    def under(self, reducer: Reducer | None) -> AbstractContextManager[Any]:
        """The model with a reducer at work inside of a ``with`` block."""
        if reducer is None:
            return contextlib.nullcontext()
        return vtoken.reduce(self.model, reducer, positions=self.spec.positions)

    def answer(
        self,
        questions: Sequence[Question],
        reducer: Reducer | None = None,
        log: SampleLog | None = None,
        on_answers: Callable[[int], None] = lambda count: None,
        on_broken: Callable[[DocumentError], None] = refuse,
        *,
        batch_size: int = 1,
    ) -> list[Answer | None]:
        """Answer questions, in their order; any failure is raised.

        Parameters
        ----------
        questions : sequence of Question
        reducer : Reducer, optional
            None leaves the model unpruned.
        log : SampleLog, optional
            Where answers are kept, and taken from: whole batches, for an answer must not depend on where a run was
            interrupted.
        on_answers : callable
            Told how many more questions are dealt with.
        on_broken : callable
            Told of a document that cannot be read; if it returns, that one has no answer (None).
        batch_size : int
            Prompts per forward pass, padded on the left.

        Raises
        ------
        DocumentError
            If a document cannot be read, or the model or the reducer fails on a batch of them.
        """
        found: dict[int, Answer] = {}
        with self.under(reducer):
            for numbers in batches(questions, batch_size):
                found |= self._answer_batch({i: questions[i] for i in numbers}, reducer, log, on_broken)
                on_answers(len(numbers))
        return [found.get(i) for i in range(len(questions))]

    def _answer_batch(
        self,
        questions: Mapping[int, Question],
        reducer: Reducer | None,
        log: SampleLog | None,
        on_broken: Callable[[DocumentError], None],
    ) -> dict[int, Answer]:
        batch = _prepared(questions, on_broken)
        if not batch:
            return {}
        if log is not None:
            logged = {number: log.get(asked.key) for number, asked in batch.items()}
            if all(logged.values()):
                return {number: Answer(**answer) for number, answer in logged.items() if answer}
        talks = [asked.conversation for asked in batch.values()]
        first = next(iter(questions.values()))
        try:
            said = self.generate(talks, first.arguments, reducer, [asked.evidence for asked in batch.values()])
        except EvalError:
            raise
        except Exception as error:
            readable = self._readable(batch, on_broken)
            if len(readable) == len(batch):
                raise DocumentError(first.task, [asked.question.doc_id for asked in batch.values()], error) from error
            return self._answer_batch(readable, reducer, log, on_broken)
        answers = {
            number: Answer(text, counts, asked.key, asked.picture)
            for (number, asked), (text, counts) in zip(batch.items(), said, strict=True)
        }
        if log is not None:
            log.add({answer.prompt: answer.as_dict() for answer in answers.values()})
        return answers

    def _readable(
        self, batch: Mapping[int, Prepared], on_broken: Callable[[DocumentError], None]
    ) -> dict[int, Question]:
        """The questions of a batch that failed whose pictures and clips the processor takes."""
        found = {}
        for number, asked in batch.items():
            try:
                self.encode([asked.conversation])
            except Exception as error:
                on_broken(DocumentError(asked.question.task, [asked.question.doc_id], error))
            else:
                found[number] = asked.question
        return found

    def encode(self, conversations: Sequence[Conversation]) -> Any:
        """Model inputs of a left-padded batch."""
        return self.preprocessing.encode(self.processor, conversations).to(self.model.device, self.model.dtype)

    def generate(
        self,
        conversations: Sequence[Conversation],
        arguments: Mapping[str, Any],
        reducer: Reducer | None = None,
        evidence: Sequence[Boxes | None] = (),
    ) -> list[tuple[str, dict[str, Any]]]:
        """Text and counts for each conversation of one batch.

        Parameters
        ----------
        conversations : sequence of list
        arguments : mapping
            The task's ``generation_kwargs``.
        reducer : Reducer, optional
            The one that is at work, see `under`.
        evidence : sequence
            For each conversation where its answer is.
        """
        inputs = self.encode(conversations)
        self._refuse_unseen(inputs["input_ids"], conversations)
        habits, tokenizer = self.preprocessing, self.processor.tokenizer
        options = generation_options(arguments, self.max_new_tokens, habits.max_new_tokens)
        if habits.tokenizer_eos:
            options["eos_token_id"] = tokenizer.eos_token_id
        with _own_random_numbers(inputs["input_ids"] if options["do_sample"] else None):
            out = self.model.generate(**inputs, **options, pad_token_id=tokenizer.pad_token_id)
        new = out[:, inputs["input_ids"].shape[1] :]
        stops = arguments.get("until") if habits.stop_strings else None
        texts = [cut_at(text, stops) for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
        at_work = None if reducer is None or reducer.is_identity else reducer
        visual = self._visual(inputs["input_ids"], options["num_beams"], at_work)
        known = evidence if options["num_beams"] == 1 else ()
        recalls = self._recalls(inputs, conversations, known, at_work)
        asked = inputs["attention_mask"].sum(1).tolist()
        given = (new != tokenizer.pad_token_id).sum(1).tolist()
        return [
            (text, {"input_tokens": i, "output_tokens": o, "evidence_recall": r, **v.as_dict()})
            for text, i, o, r, v in zip(texts, asked, given, recalls, visual, strict=True)
        ]

    def _refuse_unseen(self, input_ids: Tensor, conversations: Sequence[Conversation]) -> None:
        """A chat template that knows no videos leaves them out without a word."""
        for talk, count in zip(conversations, count_unpruned(input_ids, self.model.config), strict=True):
            for kind in ("video", "image"):
                if not count.visual_tokens and visual_token_ids(self.model.config) and media([talk], kind):
                    raise EvalError(
                        f"Model {self.spec.pretrained!r} made no visual token of the {kind} it was asked about: its "
                        f"chat template takes no {kind}s, so choose other tasks."
                    )

    def _recalls(
        self,
        inputs: Any,
        conversations: Sequence[Conversation],
        evidence: Sequence[Boxes | None],
        reducer: Reducer | None,
    ) -> list[float | None]:
        known = [boxes for boxes in evidence if boxes is not None]
        if not known or len(known) < len(evidence):
            return [None] * len(conversations)
        if reducer is None:
            return [1.0 if any(boxes) else None for boxes in known]
        shown = [[*media([talk], "image"), *media([talk], "video")] for talk in conversations]
        return self._evidence.recalls(inputs, shown, known, vtoken.stats(self.model))

    def _visual(self, input_ids: Any, beams: int, reducer: Reducer | None) -> list[Visual]:
        whole = count_unpruned(input_ids, self.model.config)
        if reducer is None or not any(v.visual_tokens for v in whole):
            return whole
        return count_pruned(vtoken.stats(self.model), len(input_ids), beams)


def _prepared(questions: Mapping[int, Question], on_broken: Callable[[DocumentError], None]) -> dict[int, Prepared]:
    """Questions with their pictures in memory, but for those that cannot be read."""
    found = {}
    for number, question in questions.items():
        try:
            found[number] = question.prepare()
        except EvalError:
            raise
        except Exception as error:  # decoders raise types of their own
            on_broken(DocumentError(question.task, [question.doc_id], error))
    return found


@contextlib.contextmanager
def _own_random_numbers(prompts: Tensor | None) -> Iterator[None]:
    """Sampling depends on the cell's seed and the batch alone, not on what was answered before (a resumed run)."""
    if prompts is None:
        yield
        return
    digest = hashlib.sha256(prompts.cpu().numpy().tobytes() + str(torch.initial_seed()).encode())
    with torch.random.fork_rng():
        torch.manual_seed(int.from_bytes(digest.digest()[:8], "big") >> 1)
        yield
