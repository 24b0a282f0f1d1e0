# SPDX-License-Identifier: Apache-2.0
"""The only place that drives lmms-eval: one task, one call. What it asks comes through `vtoken.eval.harness.asked`.

lmms-eval is used for tasks, prompts and scoring. What it does to a program that embeds it is undone here: importing it
removes all loguru sinks, adds warning filters and makes PIL fill up pictures that are cut off; evaluating draws bars.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtoken.eval.errors import EvalError, MissingExtraError

if TYPE_CHECKING:
    from vtoken.eval.harness.asked import Answering
    from vtoken.eval.model.questions import Answer, Question

REASONING_TAGS = '[["<think>","</think>"],["<analysis>","</analysis>"]]'  # the default of lmms-eval's command line


def is_installed() -> bool:
    """Whether lmms-eval can be imported, without importing it."""
    return importlib.util.find_spec("lmms_eval") is not None


def task_folder() -> Path:
    """Where lmms-eval's own task YAMLs are, without importing it."""
    require()
    spec = importlib.util.find_spec("lmms_eval")
    folders = spec.submodule_search_locations if spec else None
    assert folders, "require has found the package"
    return Path(folders[0]) / "tasks"


def require() -> None:
    """Check that lmms-eval can be imported.

    Raises
    ------
    MissingExtraError
        If it is not installed.
    """
    if not is_installed():
        raise MissingExtraError("Evaluation", "lmms-eval")


@functools.cache
def load_harness() -> Any:
    """Import ``lmms_eval.evaluator``; takes seconds, the host's log sinks, warning filters and PIL survive."""
    require()
    from unittest import mock  # here, because it imports asyncio: ``vtoken tasks`` needs neither

    from loguru import logger
    from PIL import ImageFile

    lenient = ImageFile.LOAD_TRUNCATED_IMAGES
    quiet = lambda *args, **kwargs: 0  # noqa: E731
    sinks = mock.patch.object(logger, "remove", quiet), mock.patch.object(logger, "add", quiet)
    with warnings.catch_warnings(), sinks[0], sinks[1], _no_log():
        evaluator = importlib.import_module("lmms_eval.evaluator")
        _silence(evaluator, importlib.import_module("lmms_eval.api.task"))
    ImageFile.LOAD_TRUNCATED_IMAGES = lenient  # it makes grey areas of what is missing, and asks about them
    return evaluator


def _silence(*modules: Any) -> None:
    """lmms-eval draws bars whatever it is told; they would tear our own display. Once, and for good."""
    from tqdm import tqdm

    class Silent(tqdm):
        """A bar that is never drawn."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    for module in modules:
        module.tqdm = Silent


@contextlib.contextmanager
def _no_log() -> Iterator[None]:
    from loguru import logger

    logger.disable("lmms_eval")
    try:
        yield
    finally:
        logger.enable("lmms_eval")


@dataclass(frozen=True)
class Evaluation:
    """What lmms-eval found: its log of every sample, sorted by document, its aggregated metrics, and our answers."""

    samples: list[dict[str, Any]]
    metrics: dict[str, Any]
    answers: Mapping[int, Answer]


def evaluate(answering: Answering, task: Any, *, limit: int | None, seed: int, output: Path) -> Evaluation:
    """Run one task.

    Parameters
    ----------
    answering : callable
        Answers the questions of the task, see `vtoken.eval.harness.asked.Asked`.
    task : lmms_eval.api.task.Task
        A task object; it can be used again.
    limit : int, optional
        Number of documents. lmms-eval would take a fraction of the first task for all of them: absolute numbers only.
    seed : int
        Of Python, numpy and torch.
    output : Path
        Where tasks write submission files.

    Raises
    ------
    EvalError
        If the task has no documents, or under a launcher of distributed programs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # lmms-eval would give every rank a part of the documents
        raise EvalError("vtoken starts its processes itself: run it without torchrun and accelerate launch.")
    evaluator = load_harness()
    from vtoken.eval.harness.asked import Asked

    def leave_out(doc_ids: set[int]) -> None:
        task._instances = [one for one in task.instances if one.doc_id not in doc_ids]
        if not task.instances:
            raise EvalError(f"No document of the task {task.config.task!r} can be asked about.")

    asked = Asked(answering, leave_out)
    # Without cli_args lmms-eval strips no reasoning tags, decodes every image twice and writes into the working
    # directory (`lmms_eval.evaluator.evaluate`).
    arguments = argparse.Namespace(
        output_path=str(output), process_with_media=False, reasoning_tags=REASONING_TAGS, log_samples=True
    )
    with _no_log():
        results = evaluator.simple_evaluate(
            model=asked,
            tasks=[task],
            task_manager=_empty_manager(),
            limit=limit,
            bootstrap_iters=0,
            cli_args=arguments,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            process_docs_parallel=1,
        )
    name = task.config.task
    first_filter = {sample["doc_id"]: sample for sample in reversed(results["samples"][name])}
    if not first_filter:
        raise EvalError(f"The task {name!r} has no documents.")
    samples = [first_filter[doc_id] for doc_id in sorted(first_filter)]
    return Evaluation(samples, dict(results["results"][name]), asked.answers)


class _CollectedError(Exception):
    """Carries questions out of lmms-eval."""

    def __init__(self, questions: Sequence[Question]) -> None:
        super().__init__()
        self.questions = questions


def collect_questions(task: Any, *, limit: int | None, seed: int, output: Path) -> Sequence[Question]:
    """What `evaluate` would have answered, in its order."""

    def collect(questions: Sequence[Question]) -> Sequence[Answer]:
        raise _CollectedError(questions)

    try:
        evaluate(collect, task, limit=limit, seed=seed, output=output)
    except _CollectedError as found:
        return found.questions
    return ()


@functools.cache
def _empty_manager() -> Any:
    """Knows no task: without one lmms-eval would index its 1,900 YAML files at every call."""
    return task_manager(include_defaults=False)


def task_manager(**options: Any) -> Any:
    """An index of lmms-eval tasks."""
    load_harness()
    from lmms_eval.tasks import TaskManager

    with _no_log():
        return TaskManager(**options)


def task_object(name: str, manager: Any) -> Any:
    """The task of that name, for chat models; loads its data."""
    from lmms_eval.tasks import get_task_dict

    with _no_log():
        return get_task_dict([name], manager, "chat")[name]
