# SPDX-License-Identifier: Apache-2.0
"""Does vtoken work on *this* model, device, type, backend and these versions? `check` finds out by running it.

What a check compares with never comes from the part that it checks: the unwrapped model, hidden tokens, a shorter
prompt, each prompt alone, a painted picture. How far two equal runs may differ is measured on the unwrapped model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # with pydantic, which `import vtoken` leaves alone
    from vtoken.doctor.report import Report

__all__ = ["check"]


def check(
    model: Any,
    inputs: Mapping[str, Any] | None = None,
    *,
    processor: Any = None,
    reducers: Sequence[str] | None = None,
    keep: float | int | Sequence[float | int] = 0.25,
    measure: bool = True,
    tokens: int = 576,
    seconds: float = 60.0,
    listen: Callable[[str], None] | None = None,
) -> Report:
    """Find out by running it whether vtoken works on a model: ``vtoken doctor``, on a model at hand.

    Parameters
    ----------
    model : nn.Module
        Unwrapped, where and as it will be used: its device, type and attention backend are what is examined.
    inputs : mapping, optional
        One prompt with a picture, as the model's processor returns it. Without it the doctor draws pictures for
        ``processor``, or makes noise for the types that `vtoken.profile` knows.
    processor : optional
        Of the model.
    reducers : sequence of str, optional
        Names, presets or YAML files; all registered ones by default.
    keep : number or sequence of numbers
        Ratios, or tokens per image.
    measure : bool
        Whether times are measured, too.
    tokens : int
        Visual tokens of prompts of noise.
    seconds : float
        How long reducers are tried; those that are left are named as not tried.
    listen : callable, optional
        Told in a line what is being done.

    Returns
    -------
    Report
        What was found; printed, it is a sentence. There is no picture and no prompt in it.

    Raises
    ------
    TypeError
        If no adapter knows the model.
    ValueError
        If it cannot be run: it is wrapped, has no weights or lacks modules, or the inputs or the processor do not fit.
    """
    from vtoken.doctor.examine import Examination

    keeps = list(keep) if isinstance(keep, Sequence) else [keep]
    examination = Examination(model, inputs, processor, reducers, keeps, tokens)
    return examination.run(measure=measure, seconds=seconds, listen=listen or (lambda line: None))
