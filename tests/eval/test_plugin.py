# SPDX-License-Identifier: Apache-2.0
"""``lmms-eval --model vtoken`` from the command line: a result, or an exit code that says there is none."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vtoken.eval.harness.driver import load_harness
from vtoken.eval.plugin import manifests
from vtoken.eval.tasks import FOLDER

LMMS_EVAL = shutil.which("lmms-eval", path=str(Path(sys.executable).parent)) or "lmms-eval"


def test_the_manifest_names_a_chat_model():
    (manifest,) = manifests()
    assert (manifest.model_id, manifest.chat_class_path) == ("vtoken", "vtoken.eval.model.reduced.ReducedModel")
    assert manifest.simple_class_path is None


def test_evaluates_end_to_end(checkpoint, private_cache, tmp_path):
    arguments = f"pretrained={checkpoint},device=cpu,reducer=fopru,keep=0.25"
    command = [LMMS_EVAL, "--model", "vtoken", "--model_args", arguments, "--include_path", str(FOLDER)]
    command += ["--tasks", "mini", "--limit", "8", "--batch_size", "4", "--log_samples"]
    command += ["--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "exact_match" in done.stdout
    (samples,) = (tmp_path / "out").rglob("*_samples_mini.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(lines) == 8
    assert {line["token_counts"][0]["visual_kept"] for line in lines} == {36}
    (results,) = (tmp_path / "out").rglob("*_results.json")
    assert "exact_match,none" in json.loads(results.read_text())["results"]["mini"]


@pytest.mark.parametrize("arguments", ["pretrained=a/b,reducer=foprue", "pretrained=a/b,reducer=fopru,kep=0.5", ""])
def test_wrong_arguments_are_errors(arguments):
    load_harness()
    from vtoken.eval.model.reduced import ReducedModel

    with pytest.raises(ValueError, match=r"did you mean|model is missing"):
        ReducedModel.create_from_arg_string(arguments, {"batch_size": 1, "device": None})


def test_under_the_command_line_of_lmms_eval_errors_end_the_process(monkeypatch, capsys):
    load_harness()
    from vtoken.eval.model.reduced import ReducedModel

    monkeypatch.setitem(sys.modules, "lmms_eval.__main__", object())
    with pytest.raises(SystemExit) as stop:
        ReducedModel.create_from_arg_string("pretrained=a/b,reducer=foprue")
    assert stop.value.code == 1
    assert "did you mean 'fopru'" in capsys.readouterr().err


BROKEN = """
import sys
import vtoken
def crash(self, ctx): raise RuntimeError("shapes do not match")
vtoken.Random.before_llm = crash
from lmms_eval.__main__ import cli_evaluate
sys.argv[0] = "lmms-eval"
cli_evaluate()
"""


def test_a_crash_is_no_score(checkpoint, private_cache, tmp_path):
    command = [sys.executable, "-c", BROKEN, "--model", "vtoken"]
    command += ["--model_args", f"pretrained={checkpoint},device=cpu,reducer=random,keep=0.5"]
    command += ["--include_path", str(FOLDER), "--tasks", "mini", "--limit", "4", "--output_path", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 1
    assert "shapes do not match" in done.stderr
    assert not list(tmp_path.rglob("*_results.json"))
