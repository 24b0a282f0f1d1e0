# SPDX-License-Identifier: Apache-2.0
"""How many tokens a ``keep`` leaves: the one rounding rule of the library."""

from __future__ import annotations

import torch
from torch import Tensor

Keep = float | int


def check_keep(keep: object) -> Keep:
    """Validate ``keep``.

    Parameters
    ----------
    keep : object
        A float in (0, 1] is a ratio of the visual tokens of each image; an int >= 1 is a number of tokens per image.
        A string is read as one of the two, so that ``"0.25"`` of a command line works.

    Raises
    ------
    ValueError
        If it is neither.
    """
    if isinstance(keep, str):
        try:
            keep = int(keep) if keep.strip().lstrip("+-").isdigit() else float(keep)
        except ValueError:
            raise ValueError(
                f"keep={keep!r} is not a number: give a ratio in (0, 1] such as 0.25, or a token count such as 64."
            ) from None
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise ValueError(
            f"keep={keep!r} is not a number: give a ratio in (0, 1] such as 0.25, or a token count such as 64."
        )
    if isinstance(keep, int):
        if keep < 1:
            raise ValueError(f"keep={keep} would leave no token: give a ratio in (0, 1] or a count of at least 1.")
    elif not 0 < keep <= 1:
        raise ValueError(
            f"keep={keep} is not a ratio in (0, 1]: write 0.25 for a quarter, an int such as 64 for a number of tokens."
        )
    return keep


def is_identity(keep: Keep) -> bool:
    """Whether ``keep`` is the ratio 1.0, which leaves the model alone. The int 1 is one token per image."""
    return isinstance(keep, float) and keep == 1.0


def budget(keep: Keep, tokens: Tensor) -> Tensor:
    """Tokens to keep of each image: ``round(keep * tokens)``, half to even, at least 1 and at most ``tokens``.

    Parameters
    ----------
    keep : float or int
        See `check_keep`.
    tokens : Tensor
        (I,) long: visual tokens of each image.

    Returns
    -------
    Tensor
        (I,) long.
    """
    wanted = torch.full_like(tokens, keep) if isinstance(keep, int) else (tokens.double() * keep).round().long()
    return torch.minimum(wanted.clamp(min=1), tokens)


def share_out(total: Tensor, weights: Tensor, room: Tensor) -> Tensor:
    """Split budgets by weight, exactly: largest remainders, never more than there is room for.

    Parameters
    ----------
    total : Tensor
        (I,) long: what each image may keep; at most ``room.sum(1)``.
    weights : Tensor
        (I, V) non-negative: share of each view.
    room : Tensor
        (I, V) long: tokens of each view.

    Returns
    -------
    Tensor
        (I, V) long; each row sums to ``total``.
    """
    share = torch.zeros_like(room)
    left = total.clone()
    for _ in range(room.shape[1] + 1):  # each pass fills at least one view or places everything that is left
        free = (room - share).clamp(min=0)
        open_weights = torch.where(free > 0, weights.double().clamp(min=1e-12), 0.0)
        exact = left[:, None] * open_weights / open_weights.sum(1, keepdim=True).clamp(min=1e-12)
        part = torch.minimum(exact.floor().long(), free)
        share += part
        left -= part.sum(1)
        if not bool(left.any()):
            break
        rest = torch.where(room - share > 0, exact - exact.floor(), -1.0)
        rank = rest.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
        extra = (rank < left[:, None]) & (room - share > 0)
        share += extra.long()
        left -= extra.sum(1)
    return share
