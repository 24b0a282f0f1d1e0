# SPDX-License-Identifier: Apache-2.0
"""lmms-eval's generation arguments in the words of transformers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

DEFAULT_MAX_NEW_TOKENS = 1024  # as lmms-eval's stock wrappers
PASSED_ON = ("num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "min_new_tokens")
SAMPLING = ("temperature", "top_p", "top_k")
HANDLED = ("until", "max_new_tokens", "do_sample", *SAMPLING, *PASSED_ON)
HARMLESS = ("image_aspect_ratio", "modality", "use_cache", "max_gen_toks")  # of the original LLaVA code and of servers


def generation_options(
    arguments: Mapping[str, Any], max_new_tokens: int | None = None, default: int = DEFAULT_MAX_NEW_TOKENS
) -> dict[str, Any]:
    """Arguments of ``generate``: greedy unless the task asks for a temperature above 0.

    Parameters
    ----------
    arguments : mapping
        The task's ``generation_kwargs``.
    max_new_tokens : int, optional
        Wins over the task's.
    default : int
        Where neither says it.
    """
    options: dict[str, Any] = {"num_beams": 1}
    options |= {name: value for name in PASSED_ON if (value := arguments.get(name)) is not None}
    options["max_new_tokens"] = max_new_tokens or arguments.get("max_new_tokens") or default
    options["do_sample"] = (arguments.get("temperature") or 0) > 0
    for name in SAMPLING:  # None silences what the checkpoint's own generation config asks for
        options[name] = arguments.get(name) if options["do_sample"] else None
    if strange := sorted(set(arguments) - {*HANDLED, *HARMLESS}):
        warnings.warn(f"vtoken ignores the generation arguments {', '.join(strange)} of this task.", stacklevel=2)
    return options


def cut_at(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first stop string."""
    stops = [until] if isinstance(until, str) else until or []
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text
