# SPDX-License-Identifier: Apache-2.0
"""Runs that must give the same: with nothing dropped, by hiding, by a shorter prompt, alone, and without a cache."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from vtoken.adapters import Adapter
from vtoken.doctor.outcome import Outcome
from vtoken.doctor.probes import Places, Without
from vtoken.doctor.prompts import Prompts
from vtoken.doctor.report import Noise
from vtoken.doctor.runs import Inputs, difference, gap, logits, steps
from vtoken.engine.masks import FULL, LINEAR, layer_type
from vtoken.reducers import Random
from vtoken.shorten import shorten
from vtoken.wrapping import reduce

NEW = 4
"""Tokens of an answer."""
SINGLE = 8
"""Tokens that are dropped one by one to see how many matter."""
SHOWS = 4.0
"""A comparison shows something if dropping moves the logits by more than this times the tolerance."""


class Sameness:
    """The comparisons on one model.

    Parameters
    ----------
    model : nn.Module
        Unwrapped.
    adapter : Adapter
        Where things are in it.
    prompts : Prompts
        What is run.
    noise : Noise
        How far equal runs may differ.
    """

    def __init__(self, model: Any, adapter: Adapter, prompts: Prompts, noise: Noise) -> None:
        self.model, self.adapter, self.prompts, self.noise = model, adapter, prompts, noise
        self.banned = [token for token in adapter.placeholders.values() if token is not None]
        depth = len(adapter.layers)
        shared = [source for n in range(depth) if (source := adapter.kv_source(n)) != n]
        middle = min([depth // 2, *shared])  # behind shared keys nothing can be dropped
        self.probe = Places(layer=middle if middle > 0 else None)

    # ------------------------------------------------------------------ nothing dropped
    def keep_all(self) -> Outcome:
        """Bit-identical where the unwrapped model repeats itself, and again when it is unwrapped."""
        model, batch = self.model, self.prompts.batch
        plain, answer = logits(model, batch), steps(model, batch, NEW, self.banned)
        hooks = _hooks(model)
        with reduce(model, Random(keep=1.0)):
            kept, kept_answer = logits(model, batch), steps(model, batch, NEW, self.banned)
        if _hooks(model) != hooks:
            return Outcome("failed", "Hooks stay behind on the model when it is unwrapped.")
        after = logits(model, batch)
        allowed = 0.0 if self.noise.repeated == 0 else self.noise.tolerance
        worst = max(gap(plain, kept), difference(answer, kept_answer))
        numbers = {"difference": worst, "unwrapped": gap(plain, after)}
        if numbers["unwrapped"] > allowed:
            return Outcome("failed", "The unwrapped model is not what it was before.", numbers)
        if worst > allowed:
            return Outcome("failed", f"With keep=1.0 logits differ by {worst:.3g} from the unwrapped model's.", numbers)
        how = "bit-identical" if worst == 0 else f"within {worst:.2g}, as the unwrapped model does not repeat itself"
        return Outcome("passed", f"Logits and answers with keep=1.0 are {how}.", numbers)

    # ------------------------------------------------------------------ dropping
    def mask(self) -> Outcome:
        """Dropping is hiding, before the decoder and inside of it."""
        if not all(self.adapter.has_attention(layer) for layer in self.adapter.layers):
            return Outcome("skipped", "In recurrent layers a hidden token is seen all the same.")
        with reduce(self.model, self.probe):
            dropped = logits(self.model, self.prompts.first)
        with reduce(self.model, self.probe, backend="mask"):
            hidden = logits(self.model, self.prompts.first, compute_all=True)
        return self._compared(dropped, hidden, "hiding the same tokens")

    def shorter(self) -> Outcome:
        """Dropping before the decoder is a shorter prompt for the stock model."""
        window, length = self._window(), self.prompts.first["input_ids"].shape[1]
        if window is not None and window < length:
            return Outcome("skipped", f"A window of {window} tokens holds other tokens in a shorter prompt.")
        probe = Places()
        with reduce(self.model, probe):
            dropped = logits(self.model, self.prompts.first)
        short = logits(self.model, shorten(self.model, self.prompts.first, probe))
        rows = min(dropped.shape[1], short.shape[1])
        return self._compared(dropped[:, -rows:], short[:, -rows:], "a shorter prompt for the unwrapped model")

    def _window(self) -> int | None:
        """Tokens that a layer sees at most, if any layer attends in windows or chunks."""
        config, depth = self.adapter.language_model.config, len(self.adapter.layers)
        if not {layer_type(self.adapter, layer) for layer in range(depth)} - {FULL, LINEAR}:
            return None
        sizes = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        return min((size for size in sizes if size), default=0)

    def _compared(self, dropped: Tensor, wanted: Tensor, what: str) -> Outcome:
        tolerance, share = self.noise.tolerance, self._share_that_matters
        worst, moved = gap(dropped, wanted), gap(dropped, self._whole[:, -dropped.shape[1] :])
        numbers = {"difference": worst, "moved": moved, "tolerance": tolerance, "share": share}
        effect = f"dropping moves the logits by {moved:.3g}, and {share:.0%} of {SINGLE} single tokens do"
        if worst > tolerance:
            return Outcome("failed", f"Logits differ by {worst:.3g} from {what}, more than {tolerance:.2g}.", numbers)
        if moved <= SHOWS * tolerance:
            return Outcome("unproven", f"Equal to {what}, which shows nothing here: {effect}.", numbers)
        return Outcome("passed", f"Equal to {what} within {worst:.2g}; {effect}.", numbers)

    @functools.cached_property
    def _whole(self) -> Tensor:
        """Logits of the first prompt, of which nothing is dropped."""
        return logits(self.model, self.prompts.first)

    @functools.cached_property
    def _share_that_matters(self) -> float:
        """Of some single tokens, how many move the logits beyond rounding when they alone are dropped."""
        count = int((self.adapter.modality_in(self.prompts.first) > 0).sum())
        tokens = torch.linspace(0, count - 1, min(SINGLE, count)).long().unique().tolist()
        moved = 0
        for token in tokens:
            with reduce(self.model, Without(token=token)):
                moved += gap(logits(self.model, self.prompts.first), self._whole) > self.noise.tolerance
        return moved / max(len(tokens), 1)

    # ------------------------------------------------------------------ batches and caches
    def batch(self) -> Outcome:
        """Each row of a padded batch gives what its prompt gives alone."""
        if not self.prompts.batched:
            return Outcome("skipped", "No batch can be made of such inputs: pass a processor, which makes one.")
        with reduce(self.model, self.probe):
            together = self._answers(self.prompts.batch)
            alone = [self._answers(one) for one in (self.prompts.first, self.prompts.second)]
        worst = max(
            difference(type(row)(together.tokens[n : n + 1], together.logits[n : n + 1]), row)
            for n, row in enumerate(alone)
        )
        tolerance = max(self.noise.tolerance, 4 * self.noise.padded if self.noise.padding_matters else 0.0)
        numbers = {"difference": worst, "tolerance": tolerance}
        if worst > tolerance:
            return Outcome("failed", f"A row of a batch differs by {worst:.3g} from its prompt alone.", numbers)
        if self.noise.padding_matters:
            return Outcome("unproven", "The rows of the unwrapped model, too, depend on their padding.", numbers)
        return Outcome(
            "passed", f"Each row of a padded batch gives what its prompt gives alone, within {worst:.2g}.", numbers
        )

    def cache(self) -> Outcome:
        """Decoding on the pruned cache is computing everything anew."""
        with reduce(self.model, self.probe):
            cached = self._answers(self.prompts.batch)
            anew = self._answers(self.prompts.batch, use_cache=False)
        worst = difference(cached, anew)
        plain = difference(self._answers(self.prompts.batch), self._answers(self.prompts.batch, use_cache=False))
        tolerance = max(self.noise.tolerance, 4 * plain)
        numbers = {"difference": worst, "unwrapped": plain, "tolerance": tolerance}
        if worst > tolerance:
            return Outcome(
                "failed", f"Steps on the pruned cache differ by {worst:.3g} from a run without one.", numbers
            )
        return Outcome("passed", f"{NEW} steps on the pruned cache are those without one, within {worst:.2g}.", numbers)

    def _answers(self, inputs: Inputs, **options: Any) -> Any:
        return steps(self.model, inputs, NEW, self.banned, **options)


def _hooks(model: Any) -> list[tuple[int, int]]:
    return [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in model.modules()]
