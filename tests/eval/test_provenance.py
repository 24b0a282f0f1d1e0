# SPDX-License-Identifier: Apache-2.0
"""Where a result comes from: code, machine, questions."""

import re
import subprocess
from pathlib import Path

import pytest

from vtoken.eval.provenance import commit, prompts_digest, surroundings


def test_surroundings_name_code_versions_and_devices():
    found = surroundings()
    assert {"vtoken", "vtoken code", "vtoken commit", "torch", "transformers", "lmms-eval"} <= set(found)
    assert {"python", "platform", "gpu", "gpus", "cuda", "driver", "threads"} <= set(found)


def test_the_commit_is_the_checkout_s():
    root = Path(__file__).parents[2]
    try:
        head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not in a git checkout")
    assert re.fullmatch(rf"{head.stdout.strip()}(-dirty)?", commit())


def test_the_prompts_digest_sees_every_question_and_their_order():
    one, other = {"prompt": "a"}, {"prompt": "b"}
    digests = {prompts_digest(samples) for samples in ([one, other], [other, one], [one], [])}
    assert len(digests) == 4
