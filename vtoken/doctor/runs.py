# SPDX-License-Identifier: Apache-2.0
"""Running a model: logits of a prefill, of decode steps, and what its language model is called with.

Nothing here knows reducers: a wrapped and an unwrapped model are run in the same way. Whoever calls says that no
gradients are kept.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vtoken.adapters.base import Adapter

Inputs = dict[str, Any]
TAIL = 8
"""Rows at the end of a prompt whose logits are compared."""


def logits(model: Any, inputs: Mapping[str, Any], rows: int = TAIL, *, compute_all: bool = False) -> Tensor:
    """(B, R, V) float32 on the CPU: logits of the last ``rows`` tokens of a prefill, fewer if there are fewer.

    ``compute_all`` has the model compute those of all tokens, which some decoders take as a hint to leave rows out.
    """
    options: dict[str, Any] = {"use_cache": True}
    if not compute_all and "logits_to_keep" in inspect.signature(_bare(model).forward).parameters:
        options["logits_to_keep"] = rows
    return model(**inputs, **options).logits[:, -rows:].float().cpu()


def weight_of(model: Any) -> Tensor:
    """A parameter that tells the model's type and device; quantised ones do not."""
    return next(parameter for parameter in model.parameters() if parameter.is_floating_point())


def _bare(model: Any) -> Any:
    """The model inside of a PEFT wrapper, whose forward names its arguments."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


class Steps(NamedTuple):
    """Greedy tokens (B, n) and the logits (B, n, V) that they come from, float32 on the CPU."""

    tokens: Tensor
    logits: Tensor


def steps(model: Any, inputs: Mapping[str, Any], new: int, banned: list[int], **options: Any) -> Steps:
    """Answer with exactly ``new`` tokens, none of them ``banned``."""
    out = model.generate(
        **inputs,
        min_new_tokens=new,
        max_new_tokens=new,
        do_sample=False,
        suppress_tokens=banned or None,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    found = torch.stack(out.logits, 1)
    return Steps(out.sequences[:, -new:].cpu(), found.float().cpu())


def difference(left: Steps, right: Steps) -> float:
    """Largest difference of logits up to and including the step at which the answers part.

    Behind it the two runs read different text, which says nothing.
    """
    same = (left.tokens == right.tokens).long().cumprod(1)
    compared = torch.cat([torch.ones_like(same[:, :1]), same[:, :-1]], 1).bool()
    return gap(left.logits[compared], right.logits[compared])


def gap(left: Tensor, right: Tensor) -> float:
    """Largest absolute difference; infinite where a value is not finite on one side only."""
    both = left.isfinite() & right.isfinite()
    if bool((left.isfinite() != right.isfinite()).any()) or not bool(both.any()):
        return float("inf")
    return float((left - right)[both].abs().max())


class _StopError(Exception):
    """Ends a forward pass at the language model."""


def language_call(model: Any, adapter: Adapter, inputs: Mapping[str, Any]) -> Inputs:
    """The keyword arguments with which the language model is called in a prefill; it does not run."""
    seen: list[Inputs] = []

    def stop(module: nn.Module, args: tuple, kwargs: Inputs) -> None:
        seen.append(dict(kwargs))
        raise _StopError

    handle = adapter.language_model.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with contextlib.suppress(_StopError):
            model(**inputs, use_cache=True)
    finally:
        handle.remove()
    if not seen:
        raise RuntimeError(f"{type(model).__name__} did not call its language model in a forward pass.")
    return seen[0]


@contextlib.contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Remove hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(output: Any) -> Tensor:
    """The states in what a layer or block returned."""
    return output if isinstance(output, Tensor) else output[0]


def replaced(output: Any, states: Tensor) -> Any:
    """What a layer or block returned, with other states."""
    return states if isinstance(output, Tensor) else type(output)((states, *output[1:]))


@contextlib.contextmanager
def attention_backend(model: Any, name: str) -> Iterator[None]:
    """The model with another attention backend; afterwards each of its parts has its own again."""
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    before = [(config, getattr(config, "_attn_implementation", None)) for config in configs.values()]
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        for config, backend in before:  # from the outside in: a config hands its own on to those in it
            if backend is not None:
                config._attn_implementation = backend
