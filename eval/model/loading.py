# SPDX-License-Identifier: Apache-2.0
"""Models to evaluate: embedded ones, folders and hub checkpoints, told apart by name and pinned by their weights."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vtoken import mini
from vtoken.adapters import families
from vtoken.eval.errors import EvalError, unknown
from vtoken.eval.model.preprocessing import PRESETS, preprocessing
from vtoken.eval.provenance import folder_digest
from vtoken.wrapping import POSITIONS

DTYPES = ("auto", "float32", "bfloat16", "float16")
_WEIGHTS = ("*.safetensors", "*.bin", "*.json", "*.jinja", "tokenizer.model")


@dataclass(frozen=True)
class ModelSpec:
    """How to load a model.

    Parameters
    ----------
    pretrained : str
        Name of an embedded model, a folder, or a hub id.
    revision : str, optional
        Branch, tag or commit of a hub id.
    dtype : str
        ``"auto"`` takes the checkpoint's.
    device, device_map, attn_implementation : str, optional
        As in transformers; by default the accelerator of this process, if there is one.
    positions : str
        Position ids of kept tokens, see `vtoken.wrap`.
    preprocessing : str
        ``"checkpoint"`` or ``"lmms_eval"``, see `vtoken.eval.model.preprocessing`.
    """

    pretrained: str
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None
    attn_implementation: str | None = None
    positions: str = "keep"
    preprocessing: str = "checkpoint"

    def __post_init__(self) -> None:
        for name, known in (("dtype", DTYPES), ("positions", POSITIONS), ("preprocessing", PRESETS)):
            if (value := getattr(self, name)) not in known:
                raise unknown(name, value, known)
        if self.device and self.device_map:
            raise EvalError(f"Give device={self.device!r} or device_map={self.device_map!r}, not both.")

    @property
    def kind(self) -> str:
        """``"embedded"``, ``"folder"`` or ``"hub"``."""
        if self.pretrained in mini.names():
            return "embedded"
        if Path(self.pretrained).is_dir():
            return "folder"
        if re.fullmatch(r"[\w.-]+/[\w.-]+", self.pretrained) and not self.pretrained.startswith("."):
            return "hub"
        raise unknown("model", self.pretrained, mini.names(), _kinds())

    @property
    def target(self) -> str:
        """The device the model goes to."""
        if self.device:
            return self.device
        from accelerate import PartialState

        return str(PartialState().device)  # under accelerate and torchrun: the device of this rank


def _kinds() -> str:
    return f"give an embedded model ({', '.join(mini.names())}), a folder, or a hub id such as llava-hf/llava-1.5-7b-hf"


def pin(spec: ModelSpec, *, offline: bool = False) -> tuple[str, str]:
    """`weights_id` and `model_type` of a model; ``offline`` asks the local cache alone for a hub id."""
    return weights_id(spec, offline=offline), model_type(spec, offline=offline)


def weights_id(spec: ModelSpec, *, offline: bool = False) -> str:
    """What pins the weights: the hub commit, or a hash over the files of a folder.

    Raises
    ------
    EvalError
        If there is no such model.
    """
    kind = spec.kind
    if kind == "hub":
        return str(getattr(_config(spec, offline), "_commit_hash", None))
    folder = mini.folder(spec.pretrained) if kind == "embedded" else Path(spec.pretrained)
    return folder_digest(folder, (path for pattern in _WEIGHTS for path in folder.glob(pattern)))


def model_type(spec: ModelSpec, *, offline: bool = False) -> str:
    """``config.model_type``, read without the weights.

    Raises
    ------
    EvalError
        If there is no such model, or no adapter knows its type.
    """
    found = str(_config(spec, offline).model_type)
    if found not in families():
        raise EvalError(
            f"No adapter knows the model {spec.pretrained!r} of type {found!r}: supported are "
            f"{', '.join(sorted(families()))}."
        )
    return found


def _config(spec: ModelSpec, offline: bool) -> Any:
    from transformers import AutoConfig

    where: str | Path = mini.folder(spec.pretrained) if spec.kind == "embedded" else spec.pretrained
    try:
        return AutoConfig.from_pretrained(where, revision=spec.revision, local_files_only=offline)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise EvalError(f"The model {spec.pretrained!r} cannot be read: {first_sentence(error)}") from error


def load_model(spec: ModelSpec) -> tuple[Any, Any]:
    """Load model and processor; the tokenizer pads on the left.

    Raises
    ------
    EvalError
        If the model is unknown, its files are damaged or incomplete, or it does not fit.
    """
    try:
        model, processor = _embedded(spec) if spec.kind == "embedded" else _checkpoint(spec)
    except EvalError:
        raise
    except Exception as error:  # safetensors, tokenizers and torch raise types of their own
        raise EvalError(f"The model {spec.pretrained!r} cannot be loaded: {first_sentence(error)}") from error
    processor.tokenizer.padding_side = "left"
    if spec.device_map is None:
        model.to(spec.target)
    return model.eval(), processor


def _embedded(spec: ModelSpec) -> tuple[Any, Any]:
    model, processor = mini.load(spec.pretrained)
    if spec.attn_implementation:
        model.set_attn_implementation(spec.attn_implementation)
    return (model if spec.dtype == "auto" else model.to(getattr(torch, spec.dtype))), processor


def _checkpoint(spec: ModelSpec) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    habits = preprocessing(spec.preprocessing, model_type(spec))
    options = {"device_map": spec.device_map, "attn_implementation": spec.attn_implementation}
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        spec.pretrained,
        revision=spec.revision,
        dtype=habits.dtype if spec.dtype == "auto" else spec.dtype,
        output_loading_info=True,
        **{name: value for name, value in options.items() if value is not None},
    )
    model, info = loaded
    if missing := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        # transformers fills them with random numbers and only warns
        what = f"{len(missing)} tensors, such as {missing[0]!r}, are missing"
        raise EvalError(f"The weights of {spec.pretrained!r} are incomplete: {what}.")
    return model, AutoProcessor.from_pretrained(spec.pretrained, revision=spec.revision, **habits.processor)


def first_sentence(error: BaseException) -> str:
    """What an error of another package says, up to its first full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0].rstrip(".") + "."
