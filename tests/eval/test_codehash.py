# SPDX-License-Identifier: Apache-2.0
"""The hash of the code: the same however vtoken is installed, another one after any edit of what a score depends on."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vtoken.eval.provenance import NO_SCORE, code_digest, code_files, digest_of

ROOT = Path(__file__).parents[2]
SHOW = """
import json, vtoken
from vtoken.eval.provenance import code_digest, code_files
print(json.dumps([vtoken.__file__, code_digest(), list(code_files())]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Where a wheel of this checkout is unpacked; built in a copy, since building leaves files behind."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("vtoken", "adapters", "eval", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "weights", "learned"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    build = "import setuptools.build_meta as backend; backend.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=folder, check=True, capture_output=True)
    (built,) = (folder / "dist").glob("*.whl")
    zipfile.ZipFile(built).extractall(folder / "site")
    return folder / "site"


def test_a_wheel_and_a_checkout_have_the_same_hash(wheel, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    shown = subprocess.run([sys.executable, "-c", SHOW], cwd=tmp_path, env=environment, capture_output=True, check=True)
    place, digest, files = json.loads(shown.stdout)
    assert Path(place).is_relative_to(wheel)
    assert files == list(code_files())
    assert digest == code_digest()


def test_whatever_decides_a_score_is_in_it():
    found = code_files()
    wanted = ("model/loading.py", "model/counts.py", "model/evidence.py", "harness/scores.py", "tasks/mini_attr.yaml")
    assert {f"eval/{name}" for name in wanted} | {"adapters/llava.py", "ops/lazy.py", "mini/loader.py"} <= set(found)
    on_disk = {path for folder in ("vtoken", "adapters", "eval") for path in (ROOT / folder).rglob("*.py")}
    left_out = {path for path in on_disk if path not in set(found.values())}
    for path in left_out:
        name = path.relative_to(ROOT).as_posix().removeprefix("vtoken/")
        assert any(name.startswith(part) for part in NO_SCORE), f"{name} is neither in the hash nor on the list"
    for part in NO_SCORE:
        assert (ROOT / part).exists() or (ROOT / "vtoken" / part).exists(), f"{part} is on the list and not there"


def test_an_edit_of_any_file_changes_it(tmp_path):
    copied = {name: tmp_path / name for name in code_files()}
    for name, path in code_files().items():
        copied[name].parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copied[name])
    assert digest_of(copied) == code_digest()
    seen = {code_digest()}
    for path in copied.values():
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        seen.add(digest_of(copied))
        path.write_bytes(content)
    assert len(seen) == 1 + len(copied)
    name, path = next(iter(copied.items()))
    assert digest_of({**copied, f"{name}.py": path}) not in seen
    assert digest_of({other: place for other, place in copied.items() if other != name}) not in seen
