# SPDX-License-Identifier: Apache-2.0
"""What one check came to, before it is named and timed; and whether an error is a refusal, a fault or lack of room."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vtoken.doctor.report import Status

_SENTENCE = re.compile(r"^[A-Z'].{20,}[.]$", re.DOTALL)
_OWN = {"vtoken", "adapters"}


@dataclass(frozen=True)
class Outcome:
    """Status, sentence and numbers of a check."""

    status: Status
    detail: str
    numbers: dict[str, float] = field(default_factory=dict)
    traceback: list[str] = field(default_factory=list)


def of_error(error: Exception) -> Outcome:
    """A refusal if vtoken itself says in a sentence what it cannot do; lack of memory is no fault; the rest is one."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text.lower():
        return Outcome("skipped", "There was not enough memory.")
    frames = traceback.extract_tb(error.__traceback__)
    last = Path(frames[-1].filename) if frames else Path()
    ours = bool(_OWN & set(last.parts[-4:-1]))
    if ours and isinstance(error, (ValueError, TypeError, NotImplementedError)) and _SENTENCE.match(text):
        return Outcome("refused", text)
    found = [f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} {frame.name}" for frame in frames[-6:]]
    return Outcome("failed", f"{type(error).__name__}: {text[:300] or 'no message'}", traceback=found)
