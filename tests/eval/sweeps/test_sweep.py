# SPDX-License-Identifier: Apache-2.0
"""Sweep files: errors name file, key, value and what is allowed; paths start at the file; shipped ones are sound."""

import pytest
import yaml
from taskfolder import write_task_folder

from vtoken.eval.errors import EvalError
from vtoken.eval.sweeps.cells import label
from vtoken.eval.sweeps.plan import Pins
from vtoken.eval.sweeps.sweep import load_sweep, shipped_sweep, shipped_sweeps

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
        ({"keeps": [0.5]}, "Unknown key 'keeps': did you mean 'keep'?"),
        ({"models": [{"pretrained": "a", "dtyp": "x"}]}, "models[0]: Unknown key 'dtyp': did you mean 'dtype'?"),
        ({"models": ["mini-lava"]}, "models[0]: Unknown model 'mini-lava': did you mean 'mini-llava'?"),
        ({"models": [3]}, "models[0]: 3 is not possible: give a name, or a mapping with the key 'pretrained'."),
        ({"models": [{"dtype": "auto"}]}, "the key 'models[0].pretrained' is missing."),
        ({"models": [{"pretrained": "mini-llava", "dtype": "bf16"}]}, "models[0]: Unknown dtype 'bf16'"),
        ({"models": [{"pretrained": "mini-llava", "positions": "papers"}]}, "did you mean 'paper'?"),
        ({"preprocessing": "lmms-eval"}, "preprocessing: Unknown preprocessing 'lmms-eval': did you mean 'lmms_eval'?"),
        ({"tasks": ...}, "the key 'tasks' is missing."),
        ({"tasks": "mini"}, "tasks='mini' is not possible: input should be a valid list."),
        ({"tasks": [{"task": "mini", "limit": 0}]}, "tasks[0].limit=0 is not possible: input should be greater"),
        ({"tasks": [{"task": "mini", "lmit": 1}]}, "tasks[0]: Unknown key 'lmit': did you mean 'limit'?"),
        ({"tasks": [{"task": "mini", "folder": "./x"}]}, "tasks[0]: task='mini' and folder="),
        ({"tasks": [{"task": "mini", "tasks": ["a"]}]}, "tasks[0]: tasks=['a'] is not possible with task='mini'"),
        ({"reducers": []}, "reducers=[] is not possible"),
        ({"reducers": ["random", "foprue"]}, "reducers[1]: Unknown reducer 'foprue': did you mean 'fopru'?"),
        ({"reducers": [{"reducer": "fopru", "strateggy": "row"}]}, "reducers[0]: Unknown parameter 'strateggy'"),
        ({"reducers": [7]}, "reducers[0]: 7 is no reducer"),
        ({"keep": [9.0]}, "keep[0]: keep=9.0 is not a ratio in (0, 1]"),
        ({"keep": [0.5, 0]}, "keep[1]: keep=0 would leave no token"),
        ({"keep": ["abc"]}, "keep[0]: keep='abc' is not a number"),
        ({"limit": 0}, "limit=0 is not possible: input should be greater than or equal to 1."),
        ({"limit": "many"}, "limit='many' is not possible"),
        ({"seeds": [0, -1]}, "seeds[1]=-1 is not possible"),
        ({"executor": "rey"}, "executor: Unknown executor 'rey': did you mean 'ray'?"),
        (
            {"executor": {"name": "ray", "worker": 2}},
            "executor: Unknown ray executor option 'worker': did you mean 'workers'?",
        ),
        ({"empty_limit": 2}, "empty_limit=2 is not possible"),
    ],
)
def test_wrong_files_are_a_sentence(write, changes, sentence):
    with pytest.raises(EvalError) as error:
        load_sweep(write(**changes))
    assert sentence in str(error.value)
    assert str(error.value).startswith(str(write(**changes)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a: [", "- 1", ""])
def test_files_that_are_no_mapping(tmp_path, text):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(EvalError, match=r"s\.yaml"):
        load_sweep(tmp_path / "s.yaml")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "s.yaml").write_bytes(b"\xff\xfe\xfa")
    for name in ("none.yaml", "s.yaml"):
        with pytest.raises(EvalError, match=f"{name}' cannot be read"):
            load_sweep(tmp_path / name)


def test_overrides_win_and_are_named_in_errors(write):
    assert load_sweep(write(), {"limit": 3, "batch_size": None}).limit == 3
    with pytest.raises(EvalError, match=r"^limit=-1 is not possible"):
        load_sweep(write(), {"limit": -1})


def test_an_unknown_task_is_named_with_its_file(write):
    path = write(tasks=["mini", "minni"])
    with pytest.raises(EvalError, match=r"s\.yaml: tasks\[1\]: Unknown task 'minni': did you mean 'mini'\?"):
        load_sweep(path).cells()


def test_points_are_reducers_times_budgets_after_the_unpruned_model(write):
    points = load_sweep(write(reducers=["random", "unpruned", {"reducer": "fopru", "strategy": "row"}], keep=[0.5, 16]))
    assert [(label(p), getattr(p, "keep", None)) for p in points.points()] == [
        ("unpruned", None),
        ("random", 0.5),
        ("random", 16),
        ("fopru (row)", 0.5),
        ("fopru (row)", 16),
    ]


def test_cells_are_the_whole_grid_each_once(write, private_cache):
    tasks = ["mini_count", {"task": "mini_attr", "limit": 2}]
    sweep = load_sweep(write(tasks=tasks, reducers=["random", "random", "fopru"], keep=[16], seeds=[0, 3], limit=5))
    cells = sweep.cells()
    assert [(c.task.name, c.limit, c.seed, c.label) for c in cells] == [
        (task, limit, seed, reducer)
        for task, limit in (("mini_count", 5), ("mini_attr", 2))
        for seed, reducer in ((None, "unpruned"), (0, "random"), (None, "fopru"), (3, "random"))
    ]
    assert {c.reducer.seed for c in cells if c.label == "random"} == {0, 3}
    assert {c.limit for c in sweep.limited(1).cells()} == {1}


def test_preprocessing_of_the_sweep_holds_for_models_that_say_nothing(write, private_cache):
    models = [{"pretrained": "mini-llava", "preprocessing": "checkpoint"}, "mini-llava"]
    cells = load_sweep(write(models=models, preprocessing="lmms_eval")).cells()
    assert [c.model.preprocessing for c in cells] == ["checkpoint"] * 2 + ["lmms_eval"] * 2
    assert len({c.id for c in cells}) == 4


def test_relative_paths_start_at_the_file(write, checkpoint, private_cache, tmp_path, monkeypatch):
    (tmp_path / "tiny").symlink_to(checkpoint)
    (tmp_path / "mine.yaml").write_text("reducer: fopru\nstrategy: row\n")
    write_task_folder(tmp_path / "tasks", "colors", "more_colors")
    stages = [{"reducer": "random", "keep": 0.5}, "mine.yaml"]
    path = write(
        models=["tiny"],
        tasks=["./tasks", {"folder": "tasks", "tasks": ["colors"]}],
        reducers=["mine.yaml", {"reducer": "chain", "stages": stages}],
        out="results",
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    sweep = load_sweep(path)
    assert sweep.out == str(tmp_path / "results")
    cells = sweep.cells()
    assert [(c.task.name, c.label) for c in cells] == [
        (task, reducer)
        for task in ("colors", "more_colors")
        for reducer in ("unpruned", "fopru (row)", "random 0.5 > fopru (row) 0.25")
    ]


def test_a_shipped_sweep_that_does_not_exist():
    with pytest.raises(EvalError, match="Unknown sweep 'llava1': did you mean 'llava15'"):
        shipped_sweep("llava1")


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


PAPERS = {
    "llava15": {192, 128, 64, 32},
    "llava-next": {640, 320, 160},
    "llava-next-ratios": {0.25, 0.1},
    "qwen25vl": {0.25, 0.2, 0.1},
    "internvl3": {0.25, 0.1},
    "llava-onevision-video": {0.25, 0.1},
}


def test_all_shipped_sweeps_are_sound():
    assert {*PAPERS, "compare", "quick"} <= set(shipped_sweeps())
    for path in shipped_sweeps().values():
        assert load_sweep(path).points()


@pytest.mark.parametrize("name", PAPERS)
def test_shipped_sweeps_expand_without_network(name, private_cache):
    pins = Pins(offline=True)
    cells = load_sweep(shipped_sweep(name)).cells(pins)
    assert len({c.id for c in cells}) == len(cells)
    assert {c.keep for c in cells if c.label == "random"} == PAPERS[name]
    assert {"unpruned", "random", "uniform", "pooled"} < {c.label for c in cells}
    assert [spec.kind for spec in pins.problems] == ["hub"]


def seeds_of(cells):
    return {(c.task.name, c.label): [d.seed for d in cells if (d.task, d.label) == (c.task, c.label)] for c in cells}


def test_what_no_seed_can_change_is_run_once(write, private_cache):
    """Fixed seeds of a reducer's own count as parameters; drawing stages of a chain and drawing tasks do not."""
    chain = {"reducer": "chain", "stages": [{"reducer": "random", "keep": 0.5}, {"reducer": "fastv", "keep": 0.2}]}
    fixed = {"reducer": "random", "seed": 9}
    cells = load_sweep(write(reducers=["todre", fixed, "zooprune", chain], seeds=[0, 1, 2])).cells()
    assert {label: seeds for (_, label), seeds in seeds_of(cells).items()} == {
        "unpruned": [None],
        "todre": [None],
        "random (seed=9)": [None],
        "zooprune": [0, 1, 2],
        "random 0.5 > fastv 0.2": [0, 1, 2],
    }


@pytest.mark.parametrize(
    ("edit", "draws"),
    [
        ({}, False),
        ({"colors.yaml": ("{max_new_tokens: 4}", "{max_new_tokens: 4, temperature: 0.5}")}, True),
        ({"colors.yaml": ("output_type:", "num_fewshot: 2\noutput_type:")}, True),
        ({"utils.py": ("from PIL", "import random\nfrom PIL")}, True),
    ],
    ids=["plain", "samples", "examples", "code"],
)
def test_tasks_that_may_draw_are_run_for_every_seed(write, private_cache, tmp_path, edit, draws):
    folder = write_task_folder(tmp_path / "tasks", "colors")
    for name, (old, new) in edit.items():
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))
    cells = load_sweep(write(tasks=["./tasks"], reducers=["todre"], seeds=[0, 1])).cells()
    assert [c.seed for c in cells if c.label == "todre"] == ([0, 1] if draws else [None])
