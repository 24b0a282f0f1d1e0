# SPDX-License-Identifier: Apache-2.0
"""Wrong input: one sentence on stderr, exit code 2, no traceback."""

import os
import shutil

import pytest
from typer.testing import CliRunner

from vtoken.cli import app
from vtoken.eval.harness import driver

CASES = {
    "unknown reducer": (["-r", "foprue"], "Unknown reducer 'foprue': did you mean 'fopru'?"),
    "keep 0": (["-k", "0"], "keep=0 would leave no token"),
    "keep -1": (["-k", "-1"], "keep=-1 would leave no token"),
    "keep 9.0": (["-k", "9.0"], "keep=9.0 is not a ratio in (0, 1]"),
    "keep abc": (["-k", "abc"], "keep='abc' is not a number"),
    "unknown task": (["-t", "minni"], "Unknown task 'minni': did you mean 'mini'?"),
    "limit 0": (["--limit", "0"], "limit=0 is not possible"),
    "batch size": (["--batch-size", "-4"], "batch_size=-4 is not possible"),
    "no reducer": (["-r", ""], "reducers=[] is not possible"),
}


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


def is_sentence(done, text):
    assert done.exit_code == 2, done.output
    assert text in done.stderr
    assert "Traceback" not in done.output
    assert done.stderr.strip().count("\n") == 0
    assert done.stdout == ""


@pytest.mark.parametrize("case", CASES)
def test_arguments(checkpoint, private_cache, tmp_path, case):
    arguments, text = CASES[case]
    done = run("compare", "-m", str(checkpoint), "--out", str(tmp_path), *arguments)
    is_sentence(done, text)


def test_unknown_model(tmp_path):
    is_sentence(run("compare", "-m", "mini-lava", "--out", str(tmp_path)), "Unknown model 'mini-lava'")


def test_model_without_adapter(checkpoint, private_cache, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "bert")
    (copy / "config.json").write_text('{"model_type": "bert"}')
    is_sentence(run("compare", "-m", str(copy), "--out", str(tmp_path / "out")), "No adapter knows the model")


def test_corrupted_weights(checkpoint, private_cache, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "model.safetensors").write_bytes(b"garbage" * 1000)
    done = run("compare", "-m", str(copy), "--out", str(tmp_path / "out"), "--limit", "8")
    is_sentence(done, "cannot be loaded")


def test_results_folder_that_cannot_be_written(checkpoint, private_cache, tmp_path):
    (tmp_path / "file").write_text("")
    done = run("compare", "-m", str(checkpoint), "--out", str(tmp_path / "file" / "out"))
    is_sentence(done, "cannot be written")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_results_folder(checkpoint, private_cache, tmp_path):
    tmp_path.chmod(0o500)
    is_sentence(run("compare", "-m", str(checkpoint), "--out", str(tmp_path / "out")), "cannot be written")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "reducer: fopru\nstrateggy: row\n",
            "Unknown parameter 'strateggy' of reducer 'fopru': did you mean 'strategy'?",
        ),
        ("strategy: row\n", "needs the key 'reducer'"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_reducer_files(checkpoint, private_cache, tmp_path, text, sentence):
    (tmp_path / "mine.yaml").write_text(text)
    done = run("compare", "-m", str(checkpoint), "--out", str(tmp_path), "-r", str(tmp_path / "mine.yaml"))
    is_sentence(done, sentence)


def test_missing_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(driver, "is_installed", lambda: False)
    is_sentence(run("compare", "--out", str(tmp_path)), 'pip install "vtoken[eval]"')


def test_no_reducer_of_that_name():
    is_sentence(run("list", "x*"), "No reducer matches 'x*'")
