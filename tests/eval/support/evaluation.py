# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the evaluation and command-line tests: an untrained checkpoint, cells on it, a private cache."""

from __future__ import annotations

import functools

import pytest

import vtoken
from vtoken.eval.harness.tasksource import resolve_tasks
from vtoken.eval.model.loading import ModelSpec, model_type, weights_id
from vtoken.eval.sweeps.cells import Cell
from vtoken.mini.model import build_model, build_processor


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory):
    """Generated questions go to a folder of this session, in subprocesses too."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """An embedded LLaVA with random weights, saved as any checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-llava"
    build_model().save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def make_cell(checkpoint, private_cache):
    """``make_cell("fopru", keep=0.5, limit=8)``; without a name the unpruned model."""

    @functools.cache
    def pinned(model):
        spec = ModelSpec(str(model), device="cpu")
        return {"model": spec, "weights": weights_id(spec), "model_type": model_type(spec)}

    def make(name=None, *, model=checkpoint, limit=8, batch_size=4, seed=0, task="mini", **params):
        reducer = vtoken.get_reducer(name, **params) if name else None
        return Cell(
            **pinned(model),
            reducer=reducer,
            task=resolve_tasks([task])[0],
            limit=limit,
            seed=seed,
            batch_size=batch_size,
        )

    return make
