# SPDX-License-Identifier: Apache-2.0
"""Published results beside ours: the tables of ``configs/published.yaml``, found by model, reducer and budget."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from vtoken.budget import Keep, check_keep
from vtoken.eval.errors import EvalError
from vtoken.eval.sweeps.cells import label
from vtoken.eval.sweeps.sweepfile import checked, read_mapping
from vtoken.registry import get_reducer

if TYPE_CHECKING:
    from vtoken.eval.comparison.summary import Row

BESIDE = ("reducer", "keep", "model", "ours %", "tasks", "published %", "evidence", "source", "note")
"""Columns of `beside_table`."""
LEGEND = (
    "published: per cent of the unpruned score that a source reports for the same model, reducer and keep, in brackets "
    "over how many benchmarks it is a mean, * with a note. Benchmark sets, prompts and ways to count tokens differ."
)
_NEAR = 0.002  # 64 of 576 tokens are 0.1111, and some authors write 0.1112


class Table(BaseModel):
    """Results of one source on one model, as the YAML file has them; the file says what the keys mean."""

    model_config = ConfigDict(extra="forbid")

    source: str
    evidence: Literal["paper", "secondary", "code"]
    model: str
    keep: list[Annotated[Any, AfterValidator(check_keep)]] = Field(min_length=1)
    of: int | None = Field(default=None, ge=1)
    benchmarks: int | None = Field(default=None, ge=1)
    retained: dict[str, list[float | None]] = {}
    scores: dict[str, dict[str, tuple[float, float]]] = {}
    notes: dict[str, str] = {}

    @model_validator(mode="after")
    def _fits(self) -> Table:
        for name, values in self.retained.items():
            if len(values) != len(self.keep):
                raise EvalError(f"retained.{name} has {len(values)} values: give one for each of keep={self.keep}.")
        for name in (*self.retained, *self.scores):
            get_reducer(name)
        for name in self.notes:
            if name not in {**self.retained, **self.scores}:
                raise EvalError(f"notes.{name} belongs to no reducer of the table: it has {', '.join(self.retained)}.")
        if self.scores and len(self.keep) != 1:
            raise EvalError(f"scores are of a single keep, not of {self.keep}: write a table for each.")
        return self


class Tables(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid")

    tables: list[Table]


@dataclass(frozen=True)
class Published:
    """One published result.

    Parameters
    ----------
    model : str
        Hub id.
    reducer : str
        As `vtoken.eval.sweeps.cells.label` has it.
    keep : float or int
        As in `vtoken.wrap`.
    of : int or None
        Visual tokens of the unpruned model, where they are always the same.
    task : str
        The benchmark as lmms-eval calls it, "" for a mean over several.
    retained : float
        Share of the unpruned model's score, 0.98 for 98 %.
    benchmarks : int or None
        How many the mean is over, where the source says it.
    source, evidence, note : str
        Where it is from, how it was read there, and how the method differs from ours.
    """

    model: str
    reducer: str
    keep: Keep
    of: int | None
    task: str
    retained: float
    benchmarks: int | None
    source: str
    evidence: str
    note: str

    def fits(self, model: str, reducer: str, keep: Keep | None) -> bool:
        """Whether this is about that model, reducer and budget."""
        return (model, reducer) == (self.model, self.reducer) and keep is not None and self._same_budget(keep)

    def _same_budget(self, keep: Keep) -> bool:
        if isinstance(keep, int) == isinstance(self.keep, int):
            return keep == self.keep if isinstance(keep, int) else abs(keep - self.keep) < _NEAR
        tokens, ratio = sorted((keep, self.keep), key=lambda value: isinstance(value, float))
        return self.of is not None and abs(tokens / self.of - ratio) < _NEAR

    @property
    def text(self) -> str:
        """Such as ``98.2 (8)``: per cent, in brackets how many benchmarks the mean is over, and a star with a note."""
        count = f" ({self.benchmarks})" if self.benchmarks else ""
        return f"{round(100 * self.retained, 2):g}{count}" + "*" * bool(self.note)


@functools.cache
def load_published(path: Path | None = None) -> tuple[Published, ...]:
    """All published results, in the order of the file.

    Parameters
    ----------
    path : Path, optional
        A YAML file; the one that comes with the package by default.

    Raises
    ------
    EvalError
        Naming file, key, value and what is allowed.
    """
    if path is None:
        import vtoken.configs

        path = Path(vtoken.configs.__path__[0]) / "published.yaml"
    tables = checked(Tables, read_mapping(path, Tables.model_fields), path).tables
    return tuple(one for table in tables for one in _results(table))


def _results(table: Table) -> Iterable[Published]:
    def result(name: str, keep: Keep, retained: float, task: str = "") -> Published:
        return Published(
            model=table.model,
            reducer=label(get_reducer(name)),
            keep=keep,
            of=table.of,
            task=task,
            retained=retained,
            benchmarks=None if task else table.benchmarks,
            source=table.source,
            evidence=table.evidence,
            note=table.notes.get(name, ""),
        )

    for name, values in table.retained.items():
        yield from (result(name, k, v / 100) for k, v in zip(table.keep, values, strict=True) if v is not None)
    for name, scores in table.scores.items():
        yield from (result(name, table.keep[0], ours / whole, task) for task, (ours, whole) in scores.items())


def published_retained(row: Row) -> Published | None:
    """What is published for a row: on its task if there is such a number, else the mean over a source's benchmarks."""
    fitting = [one for one in load_published() if one.fits(row.model, row.reducer, row.keep)]
    on_task = (one for one in fitting if one.task == row.task)
    return next(on_task, None) or next((one for one in fitting if not one.task), None)


def published_text(row: Row) -> str:
    """`published_retained` for a table, "" if nothing is published."""
    found = published_retained(row)
    return found.text if found else ""


def beside_table(rows: Sequence[Row]) -> list[list[str]]:
    """Cells of `BESIDE`: our mean over tasks beside every source that has one for the same model, reducer and keep."""
    ours: dict[tuple[str, str, Keep], list[float]] = {}
    for row in rows:
        if row.retained is not None and row.keep is not None:
            ours.setdefault((row.model, row.reducer, row.keep), []).append(row.retained)
    return [
        [*_names(*place), f"{100 * fmean(shares):.1f}", str(len(shares)), one.text, one.evidence, one.source, one.note]
        for place, shares in ours.items()
        for one in load_published()
        if not one.task and one.fits(*place)
    ]


def _names(model: str, reducer: str, keep: Keep) -> tuple[str, str, str]:
    return reducer, f"{keep:g}", model
