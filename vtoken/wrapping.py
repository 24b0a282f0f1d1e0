# SPDX-License-Identifier: Apache-2.0
"""``wrap``, ``unwrap``, ``reduce`` and ``stats``: the four functions most users need."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from vtoken import compat
from vtoken.adapters import Adapter, adapter_for, untested
from vtoken.defaults import default_reducers
from vtoken.engine.session import Session
from vtoken.reducers.base import Reducer
from vtoken.registry import get_reducer
from vtoken.stats import Stats

Model = TypeVar("Model", bound=nn.Module)
ATTRIBUTE = "_vtoken_session"
POSITIONS = ("keep", "compact", "paper")
BACKENDS = ("drop", "mask")
SHELLS = ("DistributedDataParallel", "FullyShardedDataParallel")
"""Modules that hold the model under ``module`` and are called in its place."""


def inside(model: nn.Module) -> nn.Module:
    """The model itself, of one that was compiled or given to a data-parallel wrapper.

    Raises
    ------
    TypeError
        If it is none, or the wrapper runs copies of the model in threads.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{model!r:.80} is no model: load one first, as AutoModelForImageTextToText.from_pretrained does."
        )
    while True:
        if isinstance(model, nn.DataParallel):
            raise TypeError(
                "torch.nn.DataParallel runs copies of the model in threads, which share one pass's state: wrap each "
                "copy in a process of its own (DistributedDataParallel)."
            )
        if (within := vars(model).get("_modules", {}).get("_orig_mod")) is None:
            if type(model).__name__ not in SHELLS:
                return model
            within = model.module
        model = within


def session_of(model: nn.Module) -> Session | None:
    """The session that `wrap` left on a model."""
    return vars(inside(model)).get(ATTRIBUTE)


def wrap(
    model: Model,
    reducer: str | Mapping[str, Any] | Path | Reducer | None = None,
    *,
    positions: str = "keep",
    backend: str = "drop",
    **params: Any,
) -> Model:
    """Make a vision-language model drop visual tokens from now on.

    Parameters
    ----------
    model : nn.Module
        A model that `vtoken.adapters` knows, also one without a head (``AutoModel``), compiled, or inside of
        DistributedDataParallel. It is changed in place, by hooks.
    reducer : str, mapping, Path or Reducer, optional
        See `vtoken.get_reducer`. Without one, what did best at this ``keep`` in the project's comparison, on this
        family if it was measured (`vtoken.defaults`); ``vtoken.stats(model).reducer`` says which it was.
    positions : {"keep", "compact", "paper"}
        Keep the original position ids of kept tokens, renumber them, or do what the reducer's authors do.
    backend : {"drop", "mask"}
        ``"mask"`` hides tokens instead of dropping them: nothing gets faster, the answers are the same.
    **params
        Parameters of the reducer, such as ``keep=0.25``.

    Returns
    -------
    nn.Module
        ``model`` itself.

    Raises
    ------
    ValueError
        If the reducer or a parameter is unknown, or the model is wrapped already.
    TypeError
        If no adapter knows the model.
    NotImplementedError
        If a module of the model takes other arguments than vtoken knows how to change.

    Warns
    -----
    UserWarning
        If the installed transformers is none of those that vtoken is tested with.
    """
    compat.warn_if_untested(2)
    if (active := session_of(model)) is not None:
        raise ValueError(f"The model is wrapped already, with {active.reducer}: call vtoken.unwrap(model) first.")
    if positions not in POSITIONS:
        raise ValueError(f"positions={positions!r} is unknown: choose one of {', '.join(POSITIONS)}.")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown: choose one of {', '.join(BACKENDS)}.")
    adapter = _adapter_of(inside(model))
    if (advice := untested(adapter)) is not None:
        warnings.warn(advice, stacklevel=2)
    session = _session(adapter, reducer, params, positions, backend)
    _attach(inside(model), session)
    return model


def _session(adapter: Adapter, reducer: Any, params: dict[str, Any], positions: str, backend: str) -> Session:
    """With the given reducer, or the first default one that serves the model."""

    def of(spec: Any) -> Session:
        built = get_reducer(spec, **params)
        return Session(adapter, built, built.positions if positions == "paper" else positions, backend)

    if reducer is not None:
        return of(reducer)
    *better, last = default_reducers(adapter.model.config.model_type, params.get("keep"))
    for name in better:
        with contextlib.suppress(NotImplementedError):
            return of(name)
    return of(last)


def _adapter_of(model: nn.Module) -> Adapter:
    """The adapter of a model that has all its parts, with weights."""
    adapter = adapter_for(model)
    adapter.check_parts()
    weights = next(adapter.language_model.parameters(), None)
    if weights is not None and weights.is_meta and not any(hasattr(part, "_hf_hook") for part in model.modules()):
        raise TypeError(
            f"The weights of {type(model).__name__} are on the meta device, where nothing can be computed: load them "
            "first (from_pretrained, or to_empty and load_state_dict)."
        )
    return adapter


def _attach(model: nn.Module, session: Session) -> None:
    session.attach()
    object.__setattr__(model, ATTRIBUTE, session)
    object.__setattr__(model, "__deepcopy__", functools.partial(_copy_wrapped, model))


def _copy_wrapped(model: Model, memo: dict[int, Any]) -> Model:
    """A deep copy with a session of its own: hooks and replaced methods refer to the model they were made for."""
    session = session_of(model)
    unwrap(model)
    try:
        twin = copy.deepcopy(model, memo)
    finally:
        _attach(model, session)  # type: ignore[arg-type]
    options = {"positions": session.positions, "backend": session.backend}  # type: ignore[union-attr]
    return wrap(twin, copy.deepcopy(session.reducer, memo), **options)  # type: ignore[union-attr]


def unwrap(model: Model) -> Model:
    """Undo `wrap`: no hook, attribute or changed method stays behind.

    Raises
    ------
    ValueError
        If the model is not wrapped.
    """
    if (session := session_of(model)) is None:
        raise ValueError("The model is not wrapped, so there is nothing to undo: call vtoken.wrap(model, ...) first.")
    session.detach()
    for name in (ATTRIBUTE, "__deepcopy__"):
        object.__delattr__(inside(model), name)
    return model


@contextlib.contextmanager
def reduce(
    model: Model, reducer: str | Mapping[str, Any] | Path | Reducer | None = None, **kwargs: Any
) -> Iterator[Model]:
    """`wrap` for the duration of a ``with`` block.

    >>> with vtoken.reduce(model, vtoken.IDPruner(keep=0.25)):  # doctest: +SKIP
    ...     model.generate(**inputs)
    """
    wrap(model, reducer, **kwargs)
    try:
        yield model
    finally:
        unwrap(model)


def stats(model: nn.Module) -> Stats:
    """Token counts of the last prefill.

    Raises
    ------
    ValueError
        If the model is not wrapped, or no prompt with an image has run since.
    """
    if (session := session_of(model)) is None:
        raise ValueError("The model is not wrapped, so there are no statistics: call vtoken.wrap(model, ...) first.")
    if session.stats is None:
        raise ValueError("No prompt with an image has run since the model was wrapped: call generate or forward first.")
    return session.stats
