# SPDX-License-Identifier: Apache-2.0
"""What settings cost on this machine, on real prompts of a task, all in turn; no accuracy is known here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from vtoken.compat import cache_of
from vtoken.engine.cache import cache_bytes
from vtoken.eval.errors import reason
from vtoken.eval.model.counts import count_unpruned
from vtoken.profile.run import Run, run_once, wrapped
from vtoken.profile.spread import Spread, alternate
from vtoken.reducers.base import Reducer
from vtoken.wrapping import stats

OBJECTIVES = {
    "ttft": "time to first token",
    "prefill": "prefill time, selection included",
    "kv": "KV cache",
    "tokens": "visual tokens per decoder layer",
}
"""What can be made cheap."""
UNITS = {"ttft": "ms", "prefill": "ms", "kv": "MiB", "tokens": "tokens"}
TIMES = {"ttft": "first_token", "prefill": "prefill"}  # and what `vtoken.profile` calls them
ROUNDS = 5
BARE = ""
"""Name of the unpruned model among the settings."""

Costs = dict[str, dict[str, float]]
"""Objective -> ``value``, ``share`` of the unpruned model's, and ``iqr`` of what is timed."""


def measure(
    model: nn.Module,
    reducers: Mapping[str, Reducer],
    inputs: Mapping[str, Any],
    *,
    rounds: int = ROUNDS,
    ran: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Costs], dict[str, str]]:
    """Measure settings and the unpruned model on one batch.

    Times are those of whole answers of two tokens. The settings take turns, so that a machine that gets slower
    meanwhile treats all alike, and a share is the median over the rounds of setting / unpruned.

    Parameters
    ----------
    model : nn.Module
        Unwrapped.
    reducers : mapping
        Name -> reducer.
    inputs : mapping
        Of the model's ``generate``, with pictures.
    rounds : int
        That count; each setting is run once before.
    ran : callable
        Told after each of the ``(rounds + 1) * (settings + 1)`` runs.

    Returns
    -------
    costs : dict
        Name -> costs; that of the unpruned model is `BARE`.
    failed : dict
        Name -> what a setting raised that does not work with this model.
    """

    def once(reducer: Reducer | None) -> Run:
        found = run_once(model, reducer, inputs, 2)
        ran()
        return found

    exact: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    runs: dict[str, Callable[[], Run]] = {}
    with torch.inference_mode():
        for name, reducer in {BARE: None, **reducers}.items():
            try:
                exact[name] = _exact(model, reducer, inputs)
                once(reducer)
            except Exception as error:
                if name == BARE:
                    raise
                failed[name] = reason(error)  # the others go on without it
            else:
                runs[name] = partial(once, reducer)
        found = alternate(runs, rounds, warmup=0)
    return {name: {**_shares(exact[name], exact[BARE]), **_times(found[name], found[BARE])} for name in found}, failed


def _exact(model: nn.Module, reducer: Reducer | None, inputs: Mapping[str, Any]) -> dict[str, float]:
    """MiB of the cache, and visual tokens averaged over the decoder layers, of a prompt of the batch."""
    with wrapped(model, reducer):
        held = cache_bytes(cache_of(model(**inputs, use_cache=True, logits_to_keep=1)))
        if reducer is not None:
            tokens = stats(model).tokens_per_layer
        else:
            tokens = sum(count.visual_per_layer for count in count_unpruned(inputs["input_ids"], model.config))
    rows = len(inputs["input_ids"])
    return {"kv": held / 2**20 / rows, "tokens": tokens / rows}


def _shares(own: Mapping[str, float], bare: Mapping[str, float]) -> Costs:
    return {name: {"value": value, "share": value / bare[name]} for name, value in own.items()}


def _times(own: Sequence[Run], bare: Sequence[Run]) -> Costs:
    """Of the batch, in milliseconds."""
    found: Costs = {}
    for objective, phase in TIMES.items():
        times = [(getattr(run, phase), getattr(other, phase)) for run, other in zip(own, bare, strict=True)]
        spread = Spread.of([time for time, _ in times])
        share = median(time / max(other, 1e-9) for time, other in times)
        found[objective] = {"value": spread.median, "iqr": spread.iqr, "share": share}
    return found
