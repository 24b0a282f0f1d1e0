# SPDX-License-Identifier: Apache-2.0
"""Which parts of the evaluation know nothing of which others."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import vtoken.eval as evaluation

MODEL_CODE = (
    *("torch", "transformers", "lmms_eval", "vtoken.reducers", "vtoken.adapters", "vtoken.engine", "vtoken.mini"),
    *("vtoken.eval.model", "vtoken.eval.harness", "vtoken.eval.running", "vtoken.eval.sweeps", "vtoken.eval.report"),
)
SHOW = """
import importlib, json, pkgutil, sys
for package in ("vtoken.eval.comparison", "vtoken.eval.store"):
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, package + "."):
        importlib.import_module(module.name)
print(json.dumps(sorted(sys.modules)))
"""


def test_finished_results_are_read_and_compared_without_model_code():
    done = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert {"vtoken.eval.comparison.summary", "vtoken.eval.store.record"} <= set(loaded)
    assert not [name for name in loaded if any(name == code or name.startswith(f"{code}.") for code in MODEL_CODE)]


def imported(file):
    """Names of all modules that a file imports, at its top or inside of functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("report", ("vtoken.eval.running", "vtoken.eval.executors")),
        ("model", ("vtoken.eval.running", "vtoken.eval.report", "vtoken.eval.comparison")),
        ("comparison", ("vtoken.eval.running", "vtoken.eval.report", "vtoken.eval.model", "vtoken.eval.harness")),
    ],
)
def test_import_arrows_point_one_way(package, forbidden):
    files = list((Path(evaluation.__file__).parent / package).glob("*.py"))
    assert len(files) > 4
    found = {name for file in files for name in imported(file) if name}
    assert "vtoken.eval.errors" in found
    assert not [name for name in found if name.startswith(forbidden)]
