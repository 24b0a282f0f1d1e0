# SPDX-License-Identifier: Apache-2.0
"""What is imported when: the package and the light commands without torch, names at first use, tested versions only.

How long that takes is measured by ``benchmarks/startup.py``; nothing here looks at a clock.
"""

import ast
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import vtoken
from vtoken import registry, wrapping

HEAVY = {
    *("torch", "transformers", "numpy", "tokenizers", "safetensors", "torchvision", "triton", "accelerate", "peft"),
    *(
        "lmms_eval",
        "datasets",
        "pyarrow",
        "pandas",
        "scipy",
        "sklearn",
        "statsmodels",
        "plotly",
        "ray",
        "PIL",
        "decord",
    ),
}
LOADED = "sorted({name.partition('.')[0] for name in sys.modules})"
COMMANDS = (
    "list",
    "tasks",
    "compare",
    "sweep",
    "report",
    "rerun",
    "show",
    "profile",
    "demo",
    "doctor",
    "tune",
    "train-gate",
    "train-scorer",
)


def fresh(code):
    """What a new process prints last, from JSON."""
    done = subprocess.run([sys.executable, "-c", f"import json, sys\n{code}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["list", "*pru*"], ["tasks"]], ids=" ".join)
def test_light_commands_import_nothing_heavy(arguments):
    code = f"""
from vtoken.cli import main
sys.argv = ["vtoken", *{arguments!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps({LOADED}))
"""
    loaded = fresh(code)
    assert "typer" in loaded
    assert not HEAVY & set(loaded)


def test_the_help_of_every_command_imports_nothing_heavy():
    code = f"""
from vtoken.cli import app, main
for name in {COMMANDS!r}:
    sys.argv = ["vtoken", name, "--help"]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0, name
print(json.dumps([{LOADED}, [command.name for command in app.registered_commands]]))
"""
    loaded, commands = fresh(code)
    assert not HEAVY & set(loaded)
    assert sorted(commands) == sorted(COMMANDS)


def test_the_package_and_its_presets_import_nothing_heavy():
    loaded, presets = fresh(f"import vtoken\npresets = vtoken.list_presets()\nprint(json.dumps([{LOADED}, presets]))")
    assert "vtoken" in loaded
    assert not HEAVY & set(loaded)
    assert presets == vtoken.list_presets()


def test_all_public_names_import_no_package_that_a_model_of_transformers_does_not():
    code = f"""
from transformers import LlavaForConditionalGeneration
before = {LOADED}
from vtoken import *
assert wrap and IDPruner
print(json.dumps(sorted(set({LOADED}) - set(before) - sys.stdlib_module_names)))
"""
    assert [name for name in fresh(code) if not name.startswith("__editable__")] == ["vtoken"]


def test_every_public_name_resolves():
    assert len(set(vtoken.__all__)) == len(vtoken.__all__)
    for name in vtoken.__all__:
        found = getattr(vtoken, name)
        assert callable(found), name
        assert found.__name__ == name
    assert set(vtoken.__all__) <= set(dir(vtoken))
    assert "__version__" in dir(vtoken)


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(vtoken.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {(name.asname or name.name): node.module for node in block.body for name in node.names}
    assert seen.pop("*") == "vtoken.reducers"
    assert seen == {name: f"vtoken.{home}" for name, home in vtoken._HOMES.items()}


def test_unknown_names_are_attribute_errors():
    for name in ("wrapp", "_private", "__wrapped__"):
        with pytest.raises(AttributeError, match=f"module 'vtoken' has no attribute '{name}'"):
            getattr(vtoken, name)
    with pytest.raises(ImportError, match="cannot import name 'wrapp'"):
        from vtoken import wrapp  # noqa: F401


def test_a_module_does_not_take_the_place_of_the_function_of_its_name():
    code = "import vtoken.budget\nfrom vtoken.budget import check_keep\n"
    assert fresh(f"{code}print(json.dumps([type(vtoken.budget).__name__, check_keep('0.5')]))") == ["function", 0.5]
    assert vtoken.stats is wrapping.stats
    assert vtoken.budget(0.5, torch.tensor([8])).tolist() == [4]


def test_modules_are_attributes_at_first_use():
    assert fresh("import vtoken\nprint(json.dumps(vtoken.registry.preset_path('vtw-15').name))") == "vtw-15.yaml"


def test_the_registry_alone_knows_all_reducers():
    code = "from vtoken.registry import list_reducers\nprint(json.dumps(list_reducers()))"
    assert {"idpruner", "fopru", "tower-prune"} <= set(fresh(code))


def test_reducers_of_the_user_are_listed(monkeypatch):
    monkeypatch.setattr(registry, "_REDUCERS", dict(registry._REDUCERS))

    @vtoken.register("mine")
    @dataclass(frozen=True)
    class Mine(vtoken.Reducer):
        pass

    assert vtoken.list_reducers("m*e") == ["mine"]
    assert vtoken.get_reducer("mine") == Mine()
