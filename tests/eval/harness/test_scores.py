# SPDX-License-Identifier: Apache-2.0
"""One score per sample, whatever a task logs; never a score for an answer that was not given."""

from types import SimpleNamespace

import pytest

from vtoken.eval.errors import EvalError
from vtoken.eval.harness.scores import flatten, main_metric
from vtoken.eval.model.questions import Answer

TASK = SimpleNamespace(config=SimpleNamespace(task="t", metric_list=[{"metric": "exact_match"}, {"metric": "f1"}]))
SAMPLE = {"doc_id": 3, "doc": {"kind": "color", "scene": 7}, "target": "red", "resps": [["Red"]]}
NOTED = Answer("Red", {"visual_kept": 36, "evidence_recall": None}, prompt="cd", picture="ab")


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (1.0, 1.0),
        (0, 0.0),
        (True, 1.0),
        ({"score": 0.5, "category": "x"}, 0.5),
        ({"pred": "A", "answer": "A "}, 1.0),
        ({"pred_answer": "B", "answer": "A"}, 0.0),
        ({"pred": 1, "ground_truth": "1"}, 1.0),
    ],
)
def test_reads_the_shapes_that_lmms_eval_logs(value, score):
    sample = {**SAMPLE, "exact_match": value}
    assert main_metric(sample, TASK) == "exact_match"
    assert flatten(sample, "exact_match", NOTED)["score"] == score


def test_takes_the_first_declared_metric_that_is_there():
    assert main_metric({**SAMPLE, "f1": 0.5, "other": 1.0}, TASK) == "f1"
    assert main_metric({**SAMPLE, "other": 1.0}, TASK) == "other"


def test_keeps_what_groups_samples_and_their_tokens():
    assert flatten({**SAMPLE, "exact_match": 1.0}, "exact_match", NOTED) == {
        "doc_id": 3,
        "kind": "color",
        "cluster": "7",
        "prompt": "cd",
        "score": 1.0,
        "answer": "Red",
        "target": "red",
        "tokens": {"visual_kept": 36},
    }


def test_pixels_group_samples_whose_documents_name_no_picture():
    sample = {**SAMPLE, "doc": {}, "exact_match": 1.0}
    assert flatten(sample, "exact_match", NOTED)["cluster"] == "ab"
    assert flatten(sample, "exact_match", Answer("", {}))["cluster"] == ""


def test_a_task_without_scores_is_an_error():
    with pytest.raises(EvalError, match=r"no score per sample .* \(it logs gpt\)"):
        main_metric({**SAMPLE, "gpt": {"prediction": "x"}}, TASK)


def test_a_failed_request_is_no_wrong_answer():
    sample = {**SAMPLE, "exact_match": 0.0, "resps": [["[LMMS_EVAL_REQUEST_FAILED after 5 retries] down"]]}
    with pytest.raises(EvalError, match="did not answer document 3"):
        flatten(sample, "exact_match", NOTED)


def test_a_missing_score_is_an_error():
    with pytest.raises(EvalError, match="no score"):
        flatten({**SAMPLE, "exact_match": None}, "exact_match", NOTED)
