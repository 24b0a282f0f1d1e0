# SPDX-License-Identifier: Apache-2.0
"""The lmms-eval model: a stock checkpoint with a reducer at work, batched, greedy, and loud when something breaks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import simple_parse_args_string
from torch import Tensor

import vtoken
from vtoken.eval.errors import EvalError
from vtoken.eval.model.arguments import positive_int, split_arguments
from vtoken.eval.model.counts import SampleCounts, Visual, count_pruned, count_unpruned, visual_token_ids
from vtoken.eval.model.evidence import Boxes, EvidenceReader
from vtoken.eval.model.fingerprints import picture_key, question_key
from vtoken.eval.model.generation import cut_at, generation_options
from vtoken.eval.model.loading import ModelSpec, load_model
from vtoken.eval.model.preprocessing import Conversation, media, preprocessing
from vtoken.eval.store.samplelog import SampleLog
from vtoken.reducers.base import Reducer
from vtoken.wrapping import session_of


class ReducedModel(lmms):
    """A vision-language model under one reducer at a time.

    Parameters
    ----------
    spec : ModelSpec
        What to load.
    reducer : Reducer, optional
        None leaves the model unpruned.
    batch_size : int
        Prompts per forward pass, padded on the left.
    max_new_tokens : int, optional
        Wins over the task's.
    """

    is_simple = False

    def __init__(
        self, spec: ModelSpec, reducer: Reducer | None = None, batch_size: int = 1, max_new_tokens: int | None = None
    ) -> None:
        super().__init__()
        self.spec, self.batch_size, self.max_new_tokens = spec, batch_size, max_new_tokens
        self.model, self.processor = load_model(spec)
        self.preprocessing = preprocessing(spec.preprocessing, self.model.config.model_type)
        self._evidence = EvidenceReader(self.model)
        self.log: SampleLog | None = None
        self.on_answers: Callable[[int], None] = lambda count: None
        self.reducer: Reducer | None = None
        self.use(reducer)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> ReducedModel:
        """Build from ``--model_args``; called by lmms-eval."""
        with _loud():
            outer = {name: value for name, value in (additional_config or {}).items() if value is not None}
            arguments = {**outer, **simple_parse_args_string(arg_string)}
            spec, reducer = split_arguments(arguments)
            limit = arguments.get("max_new_tokens")
            return cls(
                spec,
                reducer,
                positive_int("batch_size", arguments.get("batch_size", 1)),
                None if limit is None else positive_int("max_new_tokens", limit),
            )

    def use(self, reducer: Reducer | None) -> None:
        """Put another reducer to work, or none."""
        if session_of(self.model) is not None:
            vtoken.unwrap(self.model)
        if reducer is not None:
            vtoken.wrap(self.model, reducer, positions=self.spec.positions)
        self.reducer = reducer

    def __str__(self) -> str:
        """Names the reducer: lmms-eval's response cache uses this as its key."""
        return f"vtoken({self.spec}, reducer={self.reducer.config() if self.reducer else None})"

    def clean(self) -> None:
        """Keep the model: lmms-eval would delete it at the end of every evaluation."""

    @property
    def device(self) -> Any:
        """Needed by lmms-eval under data parallelism."""
        return self.model.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer all requests, in their order; any failure is raised."""
        with _loud():
            found: dict[int, dict[str, Any]] = {}
            for numbers in self.batches(requests):
                answers = self._answer_batch([requests[i] for i in numbers])
                found.update(zip(numbers, answers, strict=True))
                self.on_answers(len(numbers))
        return [GenerationResult(found[i]["text"], SampleCounts(**found[i]["counts"])) for i in range(len(requests))]

    def batches(self, requests: Sequence[Instance]) -> Iterator[list[int]]:
        """Numbers of the requests of each batch: only requests with the same generation arguments share one."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[2], sort_keys=True, default=str), []).append(number)
        for group in groups.values():
            yield from (group[i : i + self.batch_size] for i in range(0, len(group), self.batch_size))

    def _answer_batch(self, batch: Sequence[Instance]) -> list[dict[str, Any]]:
        """From the log if it has the whole batch: an answer must not depend on where a run was interrupted."""
        conversations = [self._conversation(request) for request in batch]
        keys = [question_key(request, talk) for request, talk in zip(batch, conversations, strict=True)]
        if self.log is not None and all(self.log.get(key) for key in keys):
            return [self.log.get(key) or {} for key in keys]
        evidence = [self._document(request).get("evidence_boxes") for request in batch]
        answers = self.answer(conversations, batch[0].args[2], evidence)
        for answer, key, talk in zip(answers, keys, conversations, strict=True):
            answer["counts"] |= {"prompt": key, "picture": picture_key(talk)}
        if self.log is not None:
            self.log.add(dict(zip(keys, answers, strict=True)))
        return answers

    def _conversation(self, request: Instance) -> Conversation:
        return ChatMessages(messages=request.args[1](self._document(request))).to_hf_messages()

    def _document(self, request: Instance) -> Any:
        _, _, _, doc_id, task, split = request.args
        return self.task_dict[task][split][doc_id]

    def encode(self, conversations: Sequence[Conversation]) -> Any:
        """Model inputs of a left-padded batch."""
        return self.preprocessing.encode(self.processor, conversations).to(self.model.device, self.model.dtype)

    def answer(
        self,
        conversations: Sequence[Conversation],
        arguments: Mapping[str, Any],
        evidence: Sequence[Boxes | None] = (),
    ) -> list[dict[str, Any]]:
        """Generate: ``{"text": ..., "counts": {...}}`` for each conversation; ``evidence`` says where its answer is."""
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
        visual = self._visual(inputs["input_ids"], options["num_beams"])
        recalls = self._recalls(inputs, conversations, evidence if options["num_beams"] == 1 else ())
        asked = inputs["attention_mask"].sum(1).tolist()
        given = (new != tokenizer.pad_token_id).sum(1).tolist()
        return [
            {"text": text, "counts": {"input_tokens": i, "output_tokens": o, "evidence_recall": r, **v.as_dict()}}
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
        self, inputs: Any, conversations: Sequence[Conversation], evidence: Sequence[Boxes | None]
    ) -> list[float | None]:
        known = [boxes for boxes in evidence if boxes is not None]
        if not known or len(known) < len(evidence):
            return [None] * len(conversations)
        if self.reducer is None or self.reducer.is_identity:
            return [1.0 if any(boxes) else None for boxes in known]
        shown = [[*media([talk], "image"), *media([talk], "video")] for talk in conversations]
        return self._evidence.recalls(inputs, shown, known, vtoken.stats(self.model))

    def _visual(self, input_ids: Any, beams: int) -> list[Visual]:
        whole = count_unpruned(input_ids, self.model.config)
        if self.reducer is None or self.reducer.is_identity or not any(v.visual_tokens for v in whole):
            return whole
        return count_pruned(vtoken.stats(self.model), len(input_ids), beams)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not offered."""
        raise NotImplementedError("The vtoken model answers by generation only: choose a generate_until task.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("The vtoken model answers single questions only: choose a generate_until task.")


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


@contextlib.contextmanager
def _loud() -> Iterator[None]:
    """Under lmms-eval's command line a failure ends the process.

    That command line prints exceptions and exits with 0 (`lmms_eval.__main__.cli_evaluate`); only what is no
    `Exception` passes.
    """
    try:
        yield
    except Exception:
        main = getattr(sys.modules.get("__main__"), "__spec__", None)
        if "lmms_eval.__main__" not in sys.modules and getattr(main, "name", "") != "lmms_eval.__main__":
            raise
        traceback.print_exc()
        raise SystemExit(1) from None
