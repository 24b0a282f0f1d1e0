# SPDX-License-Identifier: Apache-2.0
"""Before a sweep runs: models that cannot be read, states of cells, expected time."""

import dataclasses

import pytest

from vtoken.eval.errors import EvalError
from vtoken.eval.model.loading import ModelSpec
from vtoken.eval.running.listener import Listener
from vtoken.eval.store.record import Failure, Result
from vtoken.eval.store.results import Store
from vtoken.eval.sweeps.cells import UNRESOLVED
from vtoken.eval.sweeps.plan import Pins, State, estimate, fail_unresolved, states


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "out")


@pytest.fixture
def finish(store):
    def finish(cell, seconds, documents):
        store.save(cell.record(Result(seconds=seconds, documents=documents)), [])

    return finish


def test_models_that_cannot_be_read_are_collected(checkpoint):
    pins = Pins(offline=True)
    assert pins(ModelSpec(str(checkpoint)))[1] == "llava"
    assert pins(ModelSpec("someone/not-in-the-cache")) == (UNRESOLVED, "")
    assert [spec.pretrained for spec in pins.problems] == ["someone/not-in-the-cache"]


def test_cells_of_such_models_fail_with_a_traceback_and_the_others_do_not(make_cell, store):
    class Ear(Listener):
        heard = ()

        def failed(self, cell, failure):
            self.heard += (cell,)

    good, ear = make_cell(), Ear()
    bad = dataclasses.replace(good, model=ModelSpec("someone/gone"), weights=UNRESOLVED, model_type="")
    problems = {bad.model: EvalError("The model 'someone/gone' cannot be read.")}
    assert fail_unresolved([good, bad], problems, store, ear) == [bad]
    assert ear.heard == (bad,)
    failure = store.failure(bad.id)
    assert failure.error == "The model 'someone/gone' cannot be read."
    assert "EvalError" in failure.traceback
    assert store.failure(good.id) is None

    found_again = dataclasses.replace(bad, weights="0123", model_type="llava")
    assert fail_unresolved([found_again], {}, store, ear) == []
    assert store.failure(bad.id) is None


def test_states(make_cell, store, finish):
    done, failed, left = make_cell(), make_cell("random"), make_cell("uniform")
    finish(done, 1.0, 8)
    store.save_failure(failed.record(failure=Failure(error="no")))
    assert states([done, failed, left], store) == [State.FINISHED, State.FAILED, State.TODO]
    assert states([done], None) == [State.TODO]


def test_expected_time_is_that_of_the_task_or_else_of_the_model(make_cell, finish, store):
    finish(make_cell(task="mini_count"), 8.0, 8)
    finish(make_cell("random", task="mini_count"), 16.0, 8)
    finish(make_cell(task="mini_attr"), 72.0, 8)
    count, attr = make_cell("uniform", task="mini_count"), make_cell("uniform", task="mini_attr", limit=4)
    new = make_cell("uniform", task="mini_read", limit=2)
    assert estimate([count], store) == (pytest.approx(8 * 1.5), [])
    assert estimate([attr], store) == (pytest.approx(4 * 9.0), [])
    assert estimate([new], store) == (pytest.approx(2 * 4.0), [])


def test_what_has_nothing_to_go_by_is_named(make_cell, finish, store):
    cell = make_cell()
    whole = dataclasses.replace(cell, limit=None)
    assert estimate([cell], None) == (0.0, [cell])
    finish(cell, 8.0, 8)
    assert estimate([whole], store) == (0.0, [whole])  # how many documents there are is not known
    finish(whole, 20.0, 40)
    assert estimate([dataclasses.replace(whole, seed=1)], store) == (pytest.approx(40 * 0.75), [])
