# SPDX-License-Identifier: Apache-2.0
"""``vtoken.wrap(model)`` without a name: the reducer comes from the committed results, and is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

import vtoken
from vtoken.defaults import FILE, OTHERS, default_reducers

ROOT = Path(__file__).parents[2]
TABLE = json.loads(FILE.read_text(encoding="utf-8"))["families"]


def test_the_table_is_that_of_the_committed_results():
    run = subprocess.run(
        [sys.executable, "benchmarks/defaults.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_the_first_is_the_best_that_spends_no_more_than_its_ratio():
    rows = json.loads((ROOT / "benchmarks" / "results" / "minis.json").read_text(encoding="utf-8"))["rows"]
    here = [row for row in rows if row["model"] == "mini-internvl" and row["keep"] == 0.1]
    (best,) = [row for row in here if row["reducer"] == TABLE["internvl"]["0.1"][0]]
    assert best["visual_per_layer"] < 0.11 * best["visual_tokens"]
    better = [row for row in here if row["accuracy"]["value"] > best["accuracy"]["value"]]
    assert all(row["visual_per_layer"] > 0.11 * row["visual_tokens"] for row in better)


@pytest.mark.parametrize(
    ("keep", "row"),
    [(None, "0.25"), (0.3, "0.25"), (0.4, "0.5"), (1.0, "0.5"), (0.12, "0.1"), (0.01, "0.05"), (64, "0.25")],
)
def test_the_nearest_measured_ratio_decides(keep, row):
    assert default_reducers("internvl", keep) == TABLE["internvl"][row]
    assert default_reducers("none_such", keep) == TABLE[OTHERS][row]


@pytest.mark.parametrize("family", tiny.BUILDERS)
def test_every_family_gets_one_that_serves_it(family):
    model, inputs = tiny.make(family, (1, 2))
    vtoken.wrap(model, keep=0.1)
    with torch.no_grad():
        model(**inputs)
    stats = vtoken.stats(model)
    names = [vtoken.get_reducer(name, keep=0.1).name for name in default_reducers(model.config.model_type, 0.1)]
    assert stats.reducer.split(",")[0] in names
    assert "keep=0.1" in stats.reducer
    assert stats.tokens_kept < stats.tokens_in


def test_parameters_go_to_the_default_too_and_wrong_ones_are_named():
    model, inputs = tiny.make("llava", (1,))
    with vtoken.reduce(model, keep=0.5, repair=True):
        model(**inputs)
        assert "repair=True" in vtoken.stats(model).reducer
    with pytest.raises(ValueError, match="keep=2"):
        vtoken.wrap(model, keep=2.0)
    with pytest.raises(ValueError, match="Unknown parameter 'kep'"):
        vtoken.wrap(model, kep=0.5)
