# SPDX-License-Identifier: Apache-2.0
"""What the visual rows of one decoder layer need not compute: a value that a reducer answers with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LightLayer:
    """What the visual rows of one decoder layer compute during prefill; text rows compute everything.

    Keys and values of visual rows are always computed, so that text goes on reading them and the cache is complete.

    Parameters
    ----------
    attention : bool
        False: visual rows do not attend, the attention adds nothing to their residual.
    ffn : float
        Leading share in [0, 1] of the neurons of the feed-forward network that visual rows use. 0: the network adds
        nothing to their residual.
    window : int or None
        Visual rows attend to those visual tokens only that stand in a square of ``2 * ((window - 1) // 2) + 1`` grid
        cells of the same view around them; to text as ever. Separators (image_newline) have no cell and count as text.
    heads : tuple of bool or None
        Attention heads in which visual rows attend; the others contribute nothing to them.

    Raises
    ------
    ValueError
        If ``ffn`` is no share or ``window`` is not positive.
    """

    attention: bool = True
    ffn: float = 1.0
    window: int | None = None
    heads: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.ffn <= 1:
            raise ValueError(f"ffn={self.ffn!r} is no share of the neurons: give a number in [0, 1].")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window!r} holds no cell of the grid: give an int of at least 1, or None.")

    @property
    def changes_attention(self) -> bool:
        """Whether visual rows attend to less than text rows would in their place."""
        return not self.attention or self.window is not None or self.heads is not None

    def __and__(self, other: LightLayer) -> LightLayer:
        """Only what both compute."""
        windows = [window for window in (self.window, other.window) if window is not None]
        heads = self.heads if other.heads is None else other.heads
        if self.heads is not None and other.heads is not None:
            heads = tuple(one and two for one, two in zip(self.heads, other.heads, strict=True))
        return LightLayer(
            self.attention and other.attention, min(self.ffn, other.ffn), min(windows, default=None), heads
        )
