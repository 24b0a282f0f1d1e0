# SPDX-License-Identifier: Apache-2.0
"""What the doctor says, typed: it can be attached to a bug report, as no picture and no prompt is in it.

Owns the format of the JSON. It must not know how anything is found out.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Status = Literal["passed", "failed", "refused", "unproven", "skipped"]
"""``unproven``: it ran, and would have looked the same with a fault. ``skipped``: it could not be tried here."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Found(_Part):
    """What the adapter found in the model; None where it has no such thing."""

    model_class: str
    model_type: str
    adapter: str
    outer: str | None
    language_model: str
    layers: int
    layer_kinds: dict[str, int] = Field(description="kind of decoder layer -> how many")
    tower: str | None
    tower_blocks: int | None
    global_blocks: list[int] | None = Field(description="blocks in which a patch attends to its whole picture")
    projector: str | None
    placeholders: dict[str, int | None] = Field(description="modality -> token id")
    parameters: int
    dtype: str
    device: str
    attention: str | None


class Prompt(_Part):
    """What was run: counts and shapes, never contents."""

    source: str
    rows: int
    visual_tokens: list[int]
    text_tokens: list[int]
    shapes: dict[str, list[int]]


class Noise(_Part):
    """Largest differences of logits between runs of the unwrapped model that ought to be equal, and what follows."""

    repeated: float = Field(description="the same prompt twice")
    order: float = Field(description="two rows in both orders")
    padded: float = Field(description="in a padded batch and alone")
    backend: float | None = Field(description="by another attention backend; None where there is none")
    scale: float = Field(description="largest logit")
    tolerance: float
    padding_matters: bool = Field(description="whether the unwrapped rows depend on their padding, beyond rounding")


class Check(_Part):
    """One question and its answer."""

    name: str
    status: Status
    detail: str
    numbers: dict[str, float] = Field(default_factory=dict)
    seconds: float = 0.0
    traceback: list[str] = Field(default_factory=list, description="file:line function, of an unexpected error")


class ReducerRow(_Part):
    """One reducer on this model."""

    reducer: str = Field(description="name and keep")
    parameters: str
    status: Status
    detail: str
    tokens_in: int | None = None
    tokens_kept: int | None = None
    tokens_per_layer: float | None = None
    selection_ms: float | None = None


class Cost(_Part):
    """Measured on the first prompt, unpruned with the fastest backend and reduced, in turn."""

    reducer: str
    attention: dict[str, float] = Field(description="milliseconds of an unpruned pass by backend")
    milliseconds: dict[str, dict[str, float]] = Field(description="side -> phase -> median")
    kv_bytes: dict[str, int]
    tokens: dict[str, float]
    prefill_speedup: float
    prefill_quartiles: tuple[float, float] = Field(description="of the speed-ups of single rounds")
    decode_speedup: float
    break_even: float | None = Field(description="visual tokens from which the prefill saves what selecting costs")
    break_even_points: list[dict[str, float]] = Field(default_factory=list)


class Report(_Part):
    """All that the doctor found out."""

    format: Literal["vtoken-doctor-1"] = "vtoken-doctor-1"
    model: str = ""
    note: str = Field(default="", description="what was changed to make the model fit, such as its depth")
    surroundings: dict[str, Any] = Field(default_factory=dict)
    found: Found | None = None
    prompt: Prompt | None = None
    noise: Noise | None = None
    checks: list[Check] = Field(default_factory=list)
    reducers: list[ReducerRow] = Field(default_factory=list)
    cost: Cost | None = None
    verdict: str = "The examination did not come to its end."
    exit_code: int = 2

    @property
    def faults(self) -> list[str]:
        """Names of the checks, and of the reducers, that failed; the first is the one to blame."""
        failed = [check.name for check in self.checks if check.status == "failed"]
        return failed + [f"reducer {row.reducer}" for row in self.reducers if row.status == "failed"]

    @property
    def ok(self) -> bool:
        """Whether everything was run and nothing failed."""
        return self.exit_code == 0

    def __str__(self) -> str:
        return self.verdict
