# SPDX-License-Identifier: Apache-2.0
"""The record of a cell: what it is, how to run it again, what came out, and what it was made with.

The only reader and writer of ``result.json`` and ``failure.json``, of this and of former versions of vtoken. It must
not import models, tasks or reducers: results are read where none of them can be loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vtoken.eval.errors import EvalError
from vtoken.eval.store.files import dump, read_json, write_atomic

SCHEMA = 2
"""Version of the files. The first, which does not say it, had no recipe and no label."""
RESULT, FAILURE, SAMPLES = "result.json", "failure.json", "samples.jsonl"
UNPRUNED = "unpruned"
"""Label of the cell without a reducer."""
_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class ModelIdentity(_Part):
    """What of a model decides a score: `vtoken.eval.model.loading.ModelSpec`, pinned by its weights.

    Parameters
    ----------
    device : str
        The device map, or the type of the device: which of several equal ones it was does not matter.
    """

    pretrained: str
    weights: str = ""
    model_type: str = ""
    dtype: str = "auto"
    attn_implementation: str | None = None
    device: str = ""
    positions: str = "keep"
    preprocessing: str = "checkpoint"


class TaskIdentity(_Part):
    """What of a task decides a score, see `vtoken.eval.harness.tasksource.TaskRef`."""

    name: str
    version: str = ""
    fingerprint: str = ""


class Identity(_Part):
    """Everything that decides the score of a cell.

    Parameters
    ----------
    reducer : dict or None
        Name and all parameters, as `vtoken.get_reducer` takes them.
    reducer_code, reducer_files : str
        Hashes of a reducer's module from outside of the package, and of the trained parts that it reads.
    seed : int or None
        None where no seed can change the answers, nor their scores: the cell stands for all seeds.
    """

    model: ModelIdentity
    reducer: dict[str, Any] | None = None
    reducer_code: str = ""
    reducer_files: str = ""
    task: TaskIdentity
    limit: int | None = None
    seed: int | None = 0
    batch_size: int = 1
    versions: dict[str, str] = {}

    @property
    def digest(self) -> str:
        """The id of the cell."""
        text = json.dumps(self.model_dump(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Recipe(_Part):
    """What running a cell again needs beyond its identity: where the model ran, and where a task of a user is defined.

    Parameters
    ----------
    device, device_map : str, optional
        As they were given.
    task_folder : str
        "" for tasks that are bundled or lmms-eval's own.
    """

    device: str | None = None
    device_map: str | None = None
    task_folder: str = ""


class Result(_Part):
    """What came out of a cell.

    Parameters
    ----------
    metric, metrics : str, dict
        The one that decides, and all of the task.
    documents, empty_answers : int
    left_out : dict
        Documents that could not be asked about, with the reason; ``documents`` does not count them.
    prompts, dataset : str
        Hash of everything that was asked, and the dataset's own fingerprint.
    seconds : float
        From its start, or from where it went on, to its end.
    """

    metric: str = ""
    metrics: dict[str, float] = {}
    documents: int = 0
    empty_answers: int = 0
    left_out: dict[int, str] = {}
    prompts: str = ""
    dataset: str = ""
    seconds: float = 0.0


class Failure(_Part):
    """How a cell failed.

    Parameters
    ----------
    error, traceback, at : str
    documents : list of int
        Those of its task that were asked about when it did, where it was one of them or their batch.
    """

    error: str
    documents: list[int] = []
    traceback: str = ""
    at: str = ""


class CellRecord(_Part):
    """A finished or failed cell.

    Parameters
    ----------
    schema_version : int
        `SCHEMA` of whoever wrote it; ``schema`` in the file.
    id : str
        `Identity.digest` at that time.
    cell : Identity
    recipe : Recipe
    label : str
        Name of the reducer with the parameters that are not at their defaults.
    result : Result or None
        None for a cell that failed.
    failure : Failure or None
    made_with : dict
        See `vtoken.eval.provenance.surroundings`.
    """

    schema_version: int = Field(default=SCHEMA, alias="schema")
    id: str
    cell: Identity
    recipe: Recipe = Recipe()
    label: str
    result: Result | None = None
    failure: Failure | None = None
    made_with: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _upgraded(cls, data: Any) -> Any:
        return _from_first(data) if isinstance(data, Mapping) and "schema" not in data and "label" not in data else data

    @property
    def keep(self) -> Any:
        """The budget, where the reducer has one."""
        return (self.cell.reducer or {}).get("keep")

    @classmethod
    def read(cls, folder: Path) -> CellRecord | None:
        """The record in the folder of a cell: of its result, else of its failure; None for none, or a damaged one.

        Raises
        ------
        EvalError
            If a newer vtoken wrote it.
        """
        return cls.read_file(folder / RESULT) or cls.read_file(folder / FAILURE)

    @classmethod
    def read_file(cls, path: Path) -> CellRecord | None:
        """The record in a ``result.json`` or ``failure.json``, see `read`."""
        data = read_json(path)
        if data is None:
            return None
        version = data.get("schema", 1)
        if isinstance(version, int) and version > SCHEMA:
            raise EvalError(f"{str(path)!r} was written by a newer vtoken (schema {version}): install that one.")
        try:
            return cls(**{"id": path.parent.name, **data})
        except ValidationError:
            return None

    def write(self, folder: Path, samples: Iterable[Mapping[str, Any]] = ()) -> None:
        """Write the record; the samples of a finished cell come first: the result vouches for them."""
        if self.result is not None:
            lines = [json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples]
            write_atomic(folder / SAMPLES, "".join(lines))
        data = self.model_dump(by_alias=True, exclude={"failure"} if self.result is not None else {"result"})
        write_atomic(folder / (FAILURE if self.result is None else RESULT), dump(data))


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The documents of a finished cell, in order."""
    return [json.loads(line) for line in (folder / SAMPLES).read_text(encoding="utf-8").splitlines()]


def _from_first(data: Mapping[str, Any]) -> dict[str, Any]:
    """A file of schema 1, where results and failures were flat and the recipe was not noted."""
    cell = data.get("cell")
    if not isinstance(cell, Mapping) or not isinstance(model := cell.get("model"), Mapping):
        return dict(data)  # refused for what is missing
    device = model.get("device") or None
    recipe = Recipe(device_map=device) if device in _DEVICE_MAPS else Recipe(device=device)
    found = {"failure": data} if "error" in data else {"result": data}
    told = {"id": data.get("id", ""), "made_with": data.get("made_with", {})}
    return {**told, "schema": 1, "cell": cell, "recipe": recipe, "label": _label_of_first(cell), **found}


def _label_of_first(cell: Mapping[str, Any]) -> str:
    """Schema 1 has no labels: they are made from the reducer, where it is known here."""
    config = cell.get("reducer")
    if config is None:
        return UNPRUNED
    from vtoken.eval.sweeps.cells import label  # takes torch, which newer records do without
    from vtoken.registry import get_reducer

    try:
        return label(get_reducer(dict(config)), cell.get("seed", 0))
    except (ValueError, TypeError):
        return str(config["reducer"])
