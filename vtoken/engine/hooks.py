# SPDX-License-Identifier: Apache-2.0
"""The few hooks that a family's adapter may need of a session: an adapter never sees the session itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from vtoken.engine.tower import VisionReader, VisionRecord


@dataclass(frozen=True)
class AdapterHooks:
    """What `vtoken.adapters.base.Adapter.install` is given.

    Parameters
    ----------
    replace : callable
        ``replace(owner, name, make)`` puts ``make(original)`` in the place of a method of one instance until the model
        is unwrapped.
    reader : VisionReader
        Watches the vision tower while something encodes.
    announce : callable
        ``announce(kinds, record, first, labels)`` says, for models without an outer module, that the next
        ``inputs_embeds`` of the language model hold visual tokens at ``kinds`` (B, S) > 0, the first of which is
        ``first`` (D,), and what is known of them.
    rows : callable
        Gives ``relative`` (B, n) and ``valid`` (B, n) of the sequence that the decoder layers work on since a cut
        inside of the decoder, as positions in the one that the language model was called with; None without one.
    places : callable
        Gives the places (B, n) that the tokens which the decoder layers work on have in the whole sequence, cached
        tokens counted, and how many tokens the cache stands for; None unless it is a prefill that a reducer is shown.
    """

    replace: Callable[[Any, str, Callable[[Callable], Callable]], None]
    reader: VisionReader
    announce: Callable[[Tensor, VisionRecord, Tensor, Tensor | None], None]
    rows: Callable[[], tuple[Tensor, Tensor] | None]
    places: Callable[[], tuple[Tensor, int] | None]
