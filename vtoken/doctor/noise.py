# SPDX-License-Identifier: Apache-2.0
"""How far two runs of the unwrapped model may differ that ought to be equal: only more than that is a fault.

In bfloat16 the order of a sum, the row of a batch, its padding and the attention kernel all move logits.
"""

from __future__ import annotations

from typing import Any

import torch

from vtoken.doctor.prompts import Prompts, join
from vtoken.doctor.report import Noise
from vtoken.doctor.runs import attention_backend, gap, logits, weight_of

MARGIN = 4.0
"""A fault differs by more than this times the noise."""
ROUNDINGS = {torch.float32: 50.0, torch.float64: 50.0}
"""By type, how many roundings of the largest logit are always allowed; one in the short types."""
NOT_ROUNDING = 0.02
"""Share of the largest logit by which padding moves rows that truly depend on it."""


def measure(model: Any, prompts: Prompts) -> Noise:
    """Run the unwrapped model twice, in both orders, padded and alone, and by another backend.

    Raises
    ------
    ValueError
        If its logits are not finite.
    """
    first, again = logits(model, prompts.first), logits(model, prompts.first)
    second = logits(model, prompts.second)
    if not bool(first.isfinite().any()) or bool(first.isnan().any() or second.isnan().any()):
        raise ValueError(
            f"The unwrapped {type(model).__name__} gives logits that are not finite in "
            f"{str(weight_of(model).dtype).removeprefix('torch.')}: choose another dtype, or check its weights."
        )
    order = alone = 0.0
    if prompts.batched:
        batch = logits(model, prompts.batch)
        alone = max(gap(batch[:1], first), gap(batch[1:], second))
        order = _order(model, prompts, batch)
    scale = float(first[first.isfinite()].abs().max())
    backend = _other_backend(model, prompts, first)
    repeated = gap(first, again)
    floor = ROUNDINGS.get(weight_of(model).dtype, 1.0) * torch.finfo(weight_of(model).dtype).eps * scale
    matters = alone > max(NOT_ROUNDING * scale, MARGIN * max(order, backend or 0.0, floor))
    noises = [repeated, order, backend or 0.0, 0.0 if matters else alone]
    return Noise(
        repeated=repeated,
        order=order,
        padded=alone,
        backend=backend,
        scale=scale,
        tolerance=max(MARGIN * max(noises), floor),
        padding_matters=matters,
    )


def _order(model: Any, prompts: Prompts, batch: torch.Tensor) -> float:
    """Difference of the rows of a batch in the other order; 0 where it cannot be put together so."""
    try:
        swapped = logits(model, join(model, [prompts.second, prompts.first]))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # only the processor of some models can make a batch
        return 0.0
    return gap(batch, swapped.flip(0))


def _other_backend(model: Any, prompts: Prompts, wanted: torch.Tensor) -> float | None:
    """Difference to eager attention, or to sdpa where eager is at work; None where the model has only one."""
    before = getattr(model.config, "_attn_implementation", None)
    if before is None or not hasattr(model, "set_attn_implementation"):
        return None
    try:
        with attention_backend(model, "sdpa" if before == "eager" else "eager"):
            return gap(logits(model, prompts.first), wanted)
    except (ValueError, NotImplementedError, ImportError, torch.OutOfMemoryError):  # it has no other one, or no room
        return None
