# SPDX-License-Identifier: Apache-2.0
"""Sweep files: errors name file, key, value and what is allowed; the shipped ones are sound."""

import pytest
import yaml

import vtoken.configs
from vtoken.eval.cells import label
from vtoken.eval.errors import EvalError
from vtoken.eval.sweep import load_sweep, shipped_sweep

GOOD = {"models": ["mini-llava"], "tasks": ["mini"], "reducers": ["random"], "keep": [0.5]}


@pytest.fixture
def write(tmp_path):
    def write(**changes):
        data = {key: value for key, value in {**GOOD, **changes}.items() if value is not ...}
        (tmp_path / "s.yaml").write_text(yaml.safe_dump(data))
        return tmp_path / "s.yaml"

    return write


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"keeps": [0.5]}, r"s\.yaml: Unknown key 'keeps': did you mean 'keep'"),
        ({"models": [{"pretrained": "a", "dtyp": "x"}]}, "Unknown key 'dtyp': did you mean 'dtype'"),
        ({"tasks": ...}, r"s\.yaml: the key 'tasks' is missing"),
        ({"limit": 0}, r"s\.yaml: limit=0 is not possible"),
        ({"limit": "many"}, "limit='many' is not possible"),
        ({"reducers": []}, r"reducers=\[\] is not possible"),
        ({"tasks": "mini"}, "tasks='mini' is not possible"),
    ],
)
def test_wrong_files_are_a_sentence(write, changes, sentence):
    with pytest.raises(EvalError, match=sentence):
        load_sweep(write(**changes))


@pytest.mark.parametrize("text", ["a: [", "- 1", ""])
def test_files_that_are_no_mapping(tmp_path, text):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(EvalError, match=r"s\.yaml"):
        load_sweep(tmp_path / "s.yaml")


def test_a_missing_file(tmp_path):
    with pytest.raises(EvalError, match="cannot be read"):
        load_sweep(tmp_path / "none.yaml")


def test_overrides_win_and_are_named_in_errors(write):
    assert load_sweep(write(), {"limit": 3, "seed": None}).limit == 3
    with pytest.raises(EvalError, match=r"^limit=-1 is not possible"):
        load_sweep(write(), {"limit": -1})


@pytest.mark.parametrize(("keep", "sentence"), [(0, "leave no token"), (9.0, "not a ratio"), ("abc", "not a number")])
def test_impossible_budgets(write, keep, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_sweep(write(keep=[keep])).points()


def test_points_are_reducers_times_budgets_after_the_unpruned_model(write):
    points = load_sweep(write(reducers=["random", "unpruned", {"reducer": "fopru", "strategy": "row"}], keep=[0.5, 16]))
    assert [(label(p), getattr(p, "keep", None)) for p in points.points()] == [
        ("unpruned", None),
        ("random", 0.5),
        ("random", 16),
        ("fopru (row)", 0.5),
        ("fopru (row)", 16),
    ]


def test_the_default_comparison_is_what_the_readme_promises():
    points = load_sweep(shipped_sweep("compare")).points()
    assert len(points) == 1 + 8 * 4
    wanted = [
        "unpruned",
        "random",
        "uniform",
        "pooled",
        "fopru",
        "fopru (row)",
        "todre (k_center)",
        "todre",
        "idpruner",
    ]
    assert list(dict.fromkeys(label(point) for point in points)) == wanted


def test_all_shipped_sweeps_are_sound():
    from pathlib import Path

    files = sorted((Path(vtoken.configs.__path__[0]) / "sweeps").glob("*.yaml"))
    assert {"compare", "quick"} <= {file.stem for file in files}
    for file in files:
        assert load_sweep(file).points()
