# SPDX-License-Identifier: Apache-2.0
"""Which parts of the evaluation know nothing of which others."""

import json
import subprocess
import sys

import pytest

MODEL_CODE = (
    *("torch", "transformers", "lmms_eval", "vtoken.reducers", "vtoken.adapters", "vtoken.engine", "vtoken.mini"),
    *("vtoken.eval.model", "vtoken.eval.harness", "vtoken.eval.running", "vtoken.eval.sweeps", "vtoken.eval.report"),
)
SHOW = """
import importlib, json, pkgutil, sys
package = importlib.import_module({package!r})
for module in pkgutil.iter_modules(package.__path__, {package!r} + "."):
    if module.name not in {left_out!r}:
        importlib.import_module(module.name)
print(json.dumps(sorted(sys.modules)))
"""


def loaded(package, left_out=()):
    """Every module that a new process has after importing all of a package."""
    code = SHOW.format(package=package, left_out=left_out)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("package", ["vtoken.eval.comparison", "vtoken.eval.store"])
def test_finished_results_are_read_and_compared_without_model_code(package):
    found = loaded(package)
    assert f"{package}.{'summary' if 'comparison' in package else 'record'}" in found
    assert not [name for name in found if any(name == code or name.startswith(f"{code}.") for code in MODEL_CODE)]


def test_the_report_imports_no_runner():
    found = loaded("vtoken.eval.report")
    assert "vtoken.eval.report.page" in found
    assert not [
        name for name in found if name.startswith(("vtoken.eval.running.", "vtoken.eval.executors", "lmms_eval"))
    ]
