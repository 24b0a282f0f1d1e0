# SPDX-License-Identifier: Apache-2.0
"""One number per sample out of lmms-eval's log, whose shape differs from task to task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vtoken.eval.errors import EvalError

_BOOKKEEPING = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash"} | {
    "input_media",
    "input",
    "submission",
}
PICTURE_KEYS = ("scene", "image_id", "imageId", "videoID")
"""What documents call the picture or clip that they ask about; without one, its pixels tell."""
_FAILED = "[LMMS_EVAL_REQUEST_FAILED"  # what lmms-eval's API models answer when the server is down


def main_metric(sample: Mapping[str, Any], task: Any) -> str:
    """The metric that decides: the first of the task's metrics that the sample has."""
    declared = [str(entry["metric"]) for entry in task.config.metric_list or []]
    present = [name for name in declared if name in sample and _score(sample[name]) is not None]
    others = [name for name in sample if name not in _BOOKKEEPING and _score(sample[name]) is not None]
    for name in (*present, *others):
        return name
    raise EvalError(
        f"Task {task.config.task!r} logs no score per sample that vtoken can read (it logs "
        f"{', '.join(sorted(set(sample) - _BOOKKEEPING))}): choose another task."
    )


def _score(value: Any) -> float | None:
    """A scalar, ``{"score": ...}``, or a prediction beside its answer."""
    if isinstance(value, (bool, int, float)):
        return float(value)
    if not isinstance(value, Mapping):
        return None
    if isinstance(score := value.get("score"), (bool, int, float)):
        return float(score)
    for given, right in (("pred", "answer"), ("pred_answer", "answer"), ("pred", "ground_truth")):
        if given in value and right in value:
            return float(str(value[given]).strip() == str(value[right]).strip())
    return None


def flatten(sample: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """What is kept of a sample: its score, answer, tokens, and how it groups with others.

    Raises
    ------
    EvalError
        If the sample has no score, or the answer is a server's failure in disguise.
    """
    score = _score(sample.get(metric))
    answer = _text(sample.get("resps"))
    if score is None:
        raise EvalError(f"Document {sample['doc_id']} has no score for {metric!r}.")
    if answer.startswith(_FAILED):
        raise EvalError(f"The model did not answer document {sample['doc_id']}: {answer}")
    doc = sample.get("doc") or {}
    tokens = dict((sample.get("token_counts") or [None])[0] or {})
    picture, prompt = tokens.pop("picture", ""), tokens.pop("prompt", "")
    return {
        "doc_id": sample["doc_id"],
        "kind": doc.get("kind", ""),
        "cluster": str(next((doc[key] for key in PICTURE_KEYS if key in doc), picture)),
        "prompt": prompt,
        "score": score,
        "answer": answer,
        "target": sample.get("target"),
        "tokens": tokens,
    }


def _text(responses: Any) -> str:
    while isinstance(responses, (list, tuple)) and responses:
        responses = responses[0]
    return str(responses)
