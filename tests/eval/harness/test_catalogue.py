# SPDX-License-Identifier: Apache-2.0
"""What ``vtoken tasks`` says about tasks is read off their files."""

import pytest

from vtoken.eval.errors import EvalError
from vtoken.eval.harness import catalogue
from vtoken.eval.harness.tasksource import named_files, task_files
from vtoken.eval.tasks import bundled_tasks


def test_every_bundled_task_is_described():
    infos = {info.name: info for info in catalogue.bundled()}
    assert set(infos) == set(bundled_tasks())
    assert all(info.asks and not info.needs and not info.trap for info in infos.values())


def test_every_note_is_about_a_task_that_exists():
    names = {*catalogue._notes()["lmms_eval"], "mmmu_val_group_img"}  # the last one's file has another name
    assert names <= set(task_files())
    assert [info.name for info in catalogue.notable()] == list(catalogue._notes()["lmms_eval"])
    files = task_files()  # of lmms-eval's own index
    assert named_files(names) == {name: files[name] for name in names}


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("pope", ("login",)),
        ("textvqa_val", ()),
        ("mmbench_en_dev", ("login", "judge key")),  # the login is in an included file
        ("mmbench_en_dev_static", ("login",)),
        ("mmvet", ("login", "judge key")),
    ],
)
def test_needs_are_read_off_the_task(name, needs):
    assert catalogue.describe(name, task_files()[name]).needs == needs


def test_traps_are_told():
    (info,) = catalogue.matching("mmbench_en_dev")
    assert "mmbench_en_dev_static" in info.trap


def test_patterns():
    names = [info.name for info in catalogue.matching("*_lite")]
    assert {"gqa_lite", "textvqa_val_lite"} <= set(names)
    assert all(name.endswith("_lite") for name in names)
    assert [info.name for info in catalogue.matching("mini_c*")] == ["mini_count"]
    with pytest.raises(EvalError, match="Unknown task 'gqa_light': did you mean 'gqa_lite'"):
        catalogue.matching("gqa_light")


def test_all_of_lmms_evals_files_can_be_read():
    assert len(catalogue.matching("*")) > 1500
