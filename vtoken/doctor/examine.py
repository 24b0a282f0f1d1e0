# SPDX-License-Identifier: Apache-2.0
"""The examination: which checks, in which order, and what becomes of one that raises.

The order is that of blame: what a later check needs is checked before it, so that the first fault names the cause. It
must not know how a check does its work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from vtoken import compat
from vtoken.adapters import Adapter
from vtoken.doctor import decoder, gains, kernels, noise, places, trying
from vtoken.doctor.finding import adapter_of, found_in
from vtoken.doctor.outcome import Outcome, of_error
from vtoken.doctor.prompts import Prompts, from_user, prompts_of
from vtoken.doctor.report import Check, Noise, Prompt, Report
from vtoken.doctor.runs import logits
from vtoken.doctor.sameness import Sameness
from vtoken.doctor.verdict import judge
from vtoken.eval.provenance import surroundings

Run = Callable[[], Outcome]


class Examination:
    """One model on the table; ``report`` holds what is known so far, also after an interrupt.

    Parameters
    ----------
    model, inputs, processor, reducers, keeps, tokens
        See `vtoken.check`.

    Raises
    ------
    TypeError, ValueError
        As `vtoken.check` does, as far as that can be said without running the model.
    """

    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Any] | None,
        processor: Any,
        reducers: Sequence[str] | None,
        keeps: Sequence[Any],
        tokens: int,
    ) -> None:
        compat.warn_if_untested(2)
        self.candidates = trying.chosen(reducers, keeps)
        self.model, self.adapter = model, adapter_of(model)
        self.report = Report(model=type(model).__name__, surroundings=surroundings())
        self.report.found = found_in(model, self.adapter)
        self.prompts = prompts_of(model, self.adapter, inputs, processor, tokens)
        self.report.prompt = _described(self.adapter, self.prompts)

    def run(self, *, measure: bool, seconds: float, listen: Callable[[str], None]) -> Report:
        """Run all checks; see `vtoken.check`."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                listen("the unwrapped model, twice and in both orders")
                self.report.noise = self._noise()
                for name, run in self._checks(self.report.noise):
                    listen(name)
                    self.report.checks.append(_checked(name, run))
                for row in trying.try_all(self.model, self.adapter, self.prompts, self.candidates, seconds):
                    listen(f"reducer {row.reducer}: {row.status}")
                    self.report.reducers.append(row)
                if measure:
                    listen("time and memory")
                    self.report.checks.append(_checked("gain", self._gain))
        finally:
            self.model.train(training)
        judge(self.report)
        return self.report

    def _noise(self) -> Noise:
        try:
            self._settle()
            return noise.measure(self.model, self.prompts)
        except torch.OutOfMemoryError:
            raise ValueError(
                f"The unwrapped {type(self.model).__name__} has no room for these prompts: take a smaller picture, "
                "dtype or depth."
            ) from None
        except (ValueError, RuntimeError, TypeError, AttributeError, IndexError, KeyError) as error:
            text = " ".join(str(error).split())[:200].rstrip(".")
            raise ValueError(
                f"The unwrapped {type(self.model).__name__} cannot run these prompts ({text}): pass inputs= or the "
                "processor of the same checkpoint, and see that the model is complete."
            ) from error

    def _settle(self) -> None:
        """Take prompts of which the unwrapped model takes a batch: of equal pictures, else the first one alone."""
        if _runs(self.model, self.prompts.batch):
            return
        alike = from_user(self.model, self.adapter, self.prompts.first)
        equal = replace(self.prompts, second=alike.second, batch=alike.batch)
        self.prompts = equal if _runs(self.model, equal.batch) else self.prompts.single()
        self.report.prompt = _described(self.adapter, self.prompts)

    def _checks(self, found: Noise) -> Iterator[tuple[str, Run]]:
        model, adapter, prompts = self.model, self.adapter, self.prompts
        same = Sameness(model, adapter, prompts, found)
        if adapter.outer is not None:
            yield "placeholders", lambda: places.placeholders(model, adapter, prompts)
            yield "token map", lambda: places.picture_map(model, adapter, prompts)
            yield "tower map", lambda: places.tower_map(model, adapter, prompts)
        yield "per-token arguments", lambda: decoder.arguments(model, adapter, prompts)
        yield "shared keys", lambda: decoder.shared_keys(model, adapter, prompts)
        yield "keep all", same.keep_all
        yield "attention that ran", lambda: decoder.attention_that_ran(model, adapter, prompts)
        yield "coming attention", lambda: decoder.coming_attention(model, adapter, prompts)
        yield "drop = mask", same.mask
        yield "drop = shorter prompt", same.shorter
        yield "batch = alone", same.batch
        yield "cache = no cache", same.cache
        yield "attention kernels", lambda: kernels.kernels(model, adapter, prompts)

    def _gain(self) -> Outcome:
        working = [row.reducer for row in self.report.reducers if row.status == "passed"]
        candidate = gains.to_measure(self.candidates, working)
        if candidate is None:
            return Outcome("skipped", "No reducer works here, so that there is nothing to measure.")
        self.report.cost, why = gains.measured(self.model, self.adapter, self.prompts, candidate)
        return Outcome("passed", gains.pays(self.report.cost, why))


def _runs(model: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether the unwrapped model takes inputs that were put together of several prompts."""
    try:
        logits(model, inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # models raise whatever shapes make them raise
        return False
    return True


def _checked(name: str, run: Run) -> Check:
    """A check as a row of the report, whatever it raises."""
    started = time.perf_counter()
    try:
        found = run()
    except Exception as error:  # the other checks go on
        found = of_error(error)
    return Check(
        name=name,
        status=found.status,
        detail=found.detail,
        numbers=found.numbers,
        traceback=found.traceback,
        seconds=time.perf_counter() - started,
    )


def _described(adapter: Adapter, prompts: Prompts) -> Prompt:
    kinds = adapter.modality_in(prompts.batch)
    real = prompts.batch["attention_mask"].bool()
    shapes = {name: list(value.shape) for name, value in prompts.batch.items() if isinstance(value, torch.Tensor)}
    return Prompt(
        source=prompts.source,
        rows=len(real),
        visual_tokens=(kinds > 0).sum(1).tolist(),
        text_tokens=(real & (kinds == 0)).sum(1).tolist(),
        shapes=shapes,
    )
