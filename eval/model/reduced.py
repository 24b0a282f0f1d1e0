# SPDX-License-Identifier: Apache-2.0
"""``lmms-eval --model vtoken``: a checkpoint under one reducer, as lmms-eval's own command line makes and asks it."""

from __future__ import annotations

import contextlib
import functools
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.utils import simple_parse_args_string

from vtoken.eval.harness.asked import Asked
from vtoken.eval.model.arguments import positive_int, split_arguments
from vtoken.eval.model.loaded import LoadedModel
from vtoken.reducers.base import Reducer


class ReducedModel(Asked):
    """A vision-language model under one reducer.

    Parameters
    ----------
    loaded : LoadedModel
    reducer : Reducer, optional
        None leaves the model unpruned.
    batch_size : int
        Prompts per forward pass.
    """

    def __init__(self, loaded: LoadedModel, reducer: Reducer | None = None, batch_size: int = 1) -> None:
        super().__init__(functools.partial(loaded.answer, reducer=reducer, batch_size=batch_size))
        self.loaded, self.reducer = loaded, reducer

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> ReducedModel:
        """Build from ``--model_args``; called by lmms-eval."""
        with _loud():
            outer = {name: value for name, value in (additional_config or {}).items() if value is not None}
            arguments = {**outer, **simple_parse_args_string(arg_string)}
            spec, reducer = split_arguments(arguments)
            limit = arguments.get("max_new_tokens")
            limit = None if limit is None else positive_int("max_new_tokens", limit)
            return cls(LoadedModel(spec, limit), reducer, positive_int("batch_size", arguments.get("batch_size", 1)))

    def __str__(self) -> str:
        """Names the reducer: lmms-eval's response cache uses this as its key."""
        return f"vtoken({self.loaded.spec}, reducer={self.reducer.config() if self.reducer else None})"

    @property
    def device(self) -> Any:
        """Needed by lmms-eval under data parallelism."""
        return self.loaded.model.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """See `Asked`."""
        with _loud():
            return super().generate_until(requests)


@contextlib.contextmanager
def _loud() -> Iterator[None]:
    """Under lmms-eval's command line a failure ends the process.

    That command line prints exceptions and exits with 0 (`lmms_eval.__main__.cli_evaluate`); only what is no
    `Exception` passes.
    """
    try:
        yield
    except Exception:
        main = getattr(sys.modules.get("__main__"), "__spec__", None)
        if "lmms_eval.__main__" not in sys.modules and getattr(main, "name", "") != "lmms_eval.__main__":
            raise
        traceback.print_exc()
        raise SystemExit(1) from None
