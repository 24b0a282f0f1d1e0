# SPDX-License-Identifier: Apache-2.0
"""``--families-report`` counts what the tests of a family showed, also under pytest-xdist."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
SUITE = """
import pytest

def families(*names):
    return pytest.mark.parametrize("family", names)

@pytest.fixture
def broken(request):
    if request.param == "before":
        raise RuntimeError
    yield
    raise RuntimeError

@pytest.mark.parametrize("plan", ["before", "inside"])
@families("llava", "qwen3_vl", "gemma3")
def test_clips(family, plan, record_property):
    if family == "gemma3":
        record_property("refused", "clips")
    assert (family, plan) != ("qwen3_vl", "inside")

@pytest.mark.parametrize("broken", ["before", "after"], indirect=True)
@families("llava")
def test_peft(family, broken):
    pass

@families("llava")
def test_bfloat16_runs(family):
    pytest.skip("not here")

@families("llava")
def test_that_is_no_feature(family):
    pass

def test_flash_attention_2():
    pass
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_counts_every_outcome_once(tmp_path, workers):
    (tmp_path / "test_some.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    path = os.pathsep.join([str(TESTS), str(TESTS / "support")])
    command = [sys.executable, "-m", "pytest", "-q", "-n", workers, "-p", "conftest", "--families-report", "out.json"]
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert set(report["versions"]) == {"python", "torch", "transformers"}
    none = {"passed": 0, "failed": 0, "skipped": 0, "refused": 0}
    assert report["families"] == {
        "gemma3": {"clips": none | {"refused": 2}},
        "llava": {"clips": none | {"passed": 2}, "bf16": none | {"skipped": 1}, "PEFT": none | {"failed": 2}},
        "qwen3_vl": {"clips": none | {"passed": 1, "failed": 1}},
    }
