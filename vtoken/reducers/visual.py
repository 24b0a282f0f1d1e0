# SPDX-License-Identifier: Apache-2.0
"""What reducers compare tokens on: features before or behind the projector."""

from __future__ import annotations

from torch import Tensor

from vtoken.context import VisualContext

VISUAL = ("tower", "projected")
"""The projector's input, and its output, which exists for every model."""


def visual_features(ctx: VisualContext, visual: str, name: str) -> Tensor:
    """(I, N, C): one of `VISUAL`, for the reducer ``name``.

    Raises
    ------
    ValueError
        If the model does not show the projector's input.
    """
    if visual == "projected":
        return ctx.features
    if ctx.projector_input is None:
        raise ValueError(
            f"Reducer {name!r} reads the projector's input, which this model does not show: give visual='projected'."
        )
    return ctx.projector_input
