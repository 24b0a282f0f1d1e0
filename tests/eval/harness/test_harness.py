# SPDX-License-Identifier: Apache-2.0
"""lmms-eval inside our process: nothing of the host is lost, nothing is printed, nothing lands elsewhere."""

import functools
import json
import subprocess
import sys

import pytest

import vtoken
from vtoken.eval.errors import EvalError, MissingExtraError
from vtoken.eval.harness import driver
from vtoken.eval.harness.tasksource import load_task, resolve_tasks
from vtoken.eval.model.loaded import LoadedModel
from vtoken.eval.model.loading import ModelSpec
from vtoken.eval.model.questions import Answer

FRESH = """
import json, sys, warnings
import vtoken, vtoken.eval.sweeps.sweep, vtoken.cli.compare
early = "lmms_eval" in sys.modules
from loguru import logger
logger.remove()
heard = []
logger.add(heard.append)
warnings.filterwarnings("error", message="of the host")
before = list(warnings.filters)
from vtoken.eval.harness.driver import load_harness
load_harness()
logger.warning("still here")
from PIL import ImageFile
same = list(warnings.filters) == before and not ImageFile.LOAD_TRUNCATED_IMAGES
print(json.dumps([early, [m.record["message"] for m in heard], same]))
"""


def test_importing_is_lazy_and_leaves_the_host_alone(tmp_path):
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [False, ["still here"], True]


@pytest.fixture(scope="module")
def model(checkpoint):
    return LoadedModel(ModelSpec(str(checkpoint), device="cpu"))


def under(model, reducer=None):
    return functools.partial(model.answer, reducer=reducer, batch_size=4)


def test_a_task_object_serves_many_runs_and_nothing_is_printed(model, private_cache, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    task = load_task("mini")
    kept = []
    for keep in (0.5, 0.25):
        found = driver.evaluate(
            under(model, vtoken.get_reducer("random", keep=keep)), task, limit=6, seed=0, output=tmp_path
        )
        kept.append({sample["token_counts"][0]["visual_kept"] for sample in found.samples})
        assert [sample["doc_id"] for sample in found.samples] == list(range(6))
        assert found.metrics["exact_match,none"] == 0.0
    assert kept == [{72}, {36}]
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_answers_without_their_reasoning_are_scored(private_cache, tmp_path):
    task = load_task("mini_attr")
    answer = task.eval_docs[0]["answer"]
    thinking = [Answer(f"<think>hm</think> {answer.upper()}", {"visual_tokens": 1})]
    found = driver.evaluate(lambda questions: thinking * len(questions), task, limit=1, seed=0, output=tmp_path)
    assert found.metrics["exact_match,none"] == 1.0


def test_pictures_are_decoded_once(model, private_cache, tmp_path):
    from vtoken.eval.tasks.mini import picture

    picture.cache_clear()
    for _ in range(2):
        driver.evaluate(under(model), load_task("mini"), limit=16, seed=0, output=tmp_path)
    assert picture.cache_info().misses == len(
        {doc["pictures"][0] for doc in load_task("mini").eval_docs.select(range(16))}
    )


def test_a_task_asks_its_own_set(private_cache):
    docs = load_task("mini_count").eval_docs
    assert (len(docs), set(docs["kind"])) == (500, {"count"})


def test_unknown_tasks_are_a_sentence():
    with pytest.raises(EvalError, match="Unknown task 'mini_atr': did you mean 'mini_attr'"):
        resolve_tasks(["mini_atr"])


def test_lmms_eval_tasks_and_groups_are_resolved(private_cache):
    assert [ref.name for ref in resolve_tasks(["gqa", "mini"])] == ["gqa", "mini"]
    names = [ref.name for ref in resolve_tasks(["mmmu_pro"])]
    assert len(names) > 1
    assert all(name.startswith("mmmu_pro") for name in names)


def test_a_missing_package_is_a_sentence(monkeypatch):
    monkeypatch.setattr(driver, "is_installed", lambda: False)
    with pytest.raises(MissingExtraError, match=r'pip install "vtoken\[eval\]"'):
        driver.require()
    with pytest.raises(MissingExtraError):
        resolve_tasks(["mini"])
