# SPDX-License-Identifier: Apache-2.0
"""``vtoken list`` and ``vtoken tasks``."""

import json

import pytest
from typer.testing import CliRunner

import vtoken
from vtoken.cli import app
from vtoken.cli.catalogue import FILE
from vtoken.cli.describe import catalogue, describe
from vtoken.eval.tasks import bundled_tasks


def test_lists_every_reducer():
    done = CliRunner().invoke(app, ["list"])
    assert done.exit_code == 0
    assert all(name in done.stdout for name in vtoken.list_reducers())
    assert "llava_next" in done.stdout


def test_what_is_listed_is_what_reducers_say():
    shipped = json.loads(FILE.read_text(encoding="utf-8"))
    assert shipped == json.loads(json.dumps(catalogue())), "run python -m vtoken.cli.describe"


def test_version():
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0
    assert done.stdout == f"vtoken {vtoken.__version__}\n"


def test_a_reducer_is_named_by_what_differs_from_its_defaults():
    assert str(vtoken.get_reducer("idpruner", keep=0.1)) == "idpruner,keep=0.1"
    assert str(vtoken.get_reducer("idpruner", keep=0.1, lam=0.9)) == "idpruner,keep=0.1,lam=0.9"


def test_lists_by_pattern():
    done = CliRunner().invoke(app, ["list", "*pru*"])
    assert "idpruner" in done.stdout
    assert "random" not in done.stdout


@pytest.mark.parametrize("name", vtoken.list_reducers())
def test_every_reducer_describes_itself(name):
    _, stages, _, servable, paper, summary = describe(vtoken.registry.reducer_class(name))
    assert stages
    assert servable in ("yes", "no")
    assert summary.endswith(".")
    assert paper == "" or paper[4] == "."


def test_servable_are_those_that_choose_from_a_picture_alone():
    told = {name: describe(vtoken.registry.reducer_class(name))[3] for name in vtoken.list_reducers()}
    assert {told[name] for name in ("divprune", "visionzip", "zooprune", "idpruner", "tome")} == {"yes"}
    assert {told[name] for name in ("cdpruner", "mmtok", "fastv", "pixelprune", "downsample", "yopo", "aim")} == {"no"}


def test_lists_every_bundled_task():
    done = CliRunner().invoke(app, ["tasks"])
    assert done.exit_code == 0
    assert set(bundled_tasks()) <= set(done.stdout.split())


def test_lists_the_tasks_of_lmms_eval():
    done = CliRunner().invoke(app, ["tasks", "textvqa*"])
    assert done.exit_code == 0
    assert "textvqa_val_lite" in done.stdout.split()
