# SPDX-License-Identifier: Apache-2.0
"""The attention of a light layer: text rows attend to everything, visual rows to less.

Queries, keys and values are those that the layer's own attention module hands to its backend; the sums are done by
``scaled_dot_product_attention`` on the rows, heads and keys that are needed.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from vtoken.engine import masks
from vtoken.engine.light.plan import BandPlan, RowPlan, See, grid_cells
from vtoken.light import LightLayer

if TYPE_CHECKING:
    from vtoken.engine.prefill import Prefill

UNKNOWN = ("softcap", "s_aux", "position_bias")
"""Arguments of attention backends that change what is computed here."""


class LightAttention:
    """Attends in the place of the backend, in one layer and one prefill.

    Parameters
    ----------
    layer : int
        Its number.
    light : LightLayer
        What visual rows need not compute.
    prefill : Prefill
        The forward pass under way.
    plans : dict
        Filled here and shared by the layers of one prefill.
    """

    def __init__(self, layer: int, light: LightLayer, prefill: Prefill, plans: dict[Any, Any]) -> None:
        self.layer, self.light, self.prefill, self.plans = layer, light, prefill, plans

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor:
        """(B, S, H, d) output of the attention.

        Parameters
        ----------
        query, key, value : Tensor
            (B, H, S, d), (B, G, K, d) and (B, G, K, d), G dividing H.
        mask : Tensor or None
            What the backend was given.

        Raises
        ------
        NotImplementedError
            If the layer's attention is none that queries, keys, values and a mask define.
        """
        if found := [name for name in UNKNOWN if kwargs.get(name) is not None]:
            raise NotImplementedError(
                f"The attention of decoder layer {self.layer} uses {found[0]}, which a light layer does not compute: "
                "use a reducer that leaves the attention of this layer alone (ima with skip='ffn')."
            )
        length, light = query.shape[2], self.light
        columns = self.prefill.stored_columns(self.layer, length)
        sums = _Sums(query, key[:, :, :columns], value[:, :, :columns], kwargs)
        see = self._visible(module, mask, (length, columns), kwargs)
        same = columns, kwargs.get("sliding_window"), query.device
        plan = functools.partial(self._plan, mask=mask, see=see, same=same)
        every = list(range(query.shape[1]))
        active = [head for head in every if light.heads is None or light.heads[head]]
        if light.attention and light.window is None:  # the model's own mask serves all rows of the active heads
            sums.everything(active, self._own_mask(mask, see, query, columns))
            sums.rows([head for head in every if head not in active], plan("text"))
            return sums.out
        sums.rows(every, plan("text"))
        if light.attention:
            sums.rows(active, plan("separators"))
            sums.bands(active, plan("grid"))
        return sums.out

    def _visible(self, module: nn.Module, mask: Any, shape: tuple[int, int], kwargs: dict[str, Any]) -> See:
        """Which keys query rows (B, R) of the layer may see: (B, R, K) bool."""
        causal, window = masks.is_causal(module, kwargs), kwargs.get("sliding_window")
        documents = self.prefill.prompt.documents_of(self.prefill.group.index)

        def see(rows: Tensor) -> Tensor:
            own = None if documents is None else documents.to(rows.device)
            return masks.seen_in(masks.rows_seen(mask, rows, shape, causal, window, own))[:, 0]

        return see

    def _own_mask(self, mask: Tensor | None, see: See, query: Tensor, columns: int) -> Tensor | None:
        """The 4-D mask of all rows, None where they are causal and nothing else."""
        rows, length = query.shape[0], query.shape[2]
        if isinstance(mask, Tensor) and mask.dim() == 4:
            return mask[..., :columns]
        if mask is None and columns == length and self.prefill.prompt.document is None:
            return None
        return see(torch.arange(length, device=query.device).expand(rows, -1))[:, None]

    def _plan(self, what: str, mask: Tensor | None, see: See, same: tuple[int, int | None, torch.device]) -> Any:
        """The rows named, and what they see: made once for all layers that work on one sequence with one mask."""
        key = what, self.light.window, self.prefill.groups[-1].start, id(mask), *same
        if key not in self.plans:
            self.plans[key] = self._make_plan(what, see, same[-1]), mask  # a mask that is kept alive keeps its id
        return self.plans[key][0]

    def _make_plan(self, what: str, see: See, device: torch.device) -> RowPlan | BandPlan:
        group = self.prefill.group.to(device)
        if what == "text":
            return RowPlan.of(group.text & group.valid, see)
        cells = grid_cells(group, self.prefill.prompt.placed.table)
        grid = cells[0] >= 0
        if what == "separators":
            return RowPlan.of(group.visual & ~grid, see)
        return BandPlan.of(grid, cells, self.light.window or 1, see)


class _Sums:
    """Attention of some heads and rows at a time; what is never asked for stays zero."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> None:
        self.query, self.key, self.value = query, key, value
        self.group = query.shape[1] // key.shape[1]
        self.options = {"scale": kwargs.get("scaling"), "dropout_p": kwargs.get("dropout", 0.0)}
        rows, heads, length, _ = query.shape
        self.out = query.new_zeros(rows, length, heads, value.shape[-1])

    def everything(self, heads: list[int], mask: Tensor | None) -> None:
        """All rows; causal without a mask."""
        if heads:
            query = _pick(self.query, heads)
            found = self._attend(query, *self._keys(heads), attn_mask=mask, is_causal=mask is None)
            self.out[:, :, heads] = found.transpose(1, 2)

    def rows(self, heads: list[int], plan: RowPlan) -> None:
        """The rows of the plan."""
        if heads and plan.index.shape[1]:
            query = _take(_pick(self.query, heads), plan.index)
            found = self._attend(query, *self._keys(heads), attn_mask=plan.seen)
            self._put(plan.here, heads, found.transpose(1, 2)[plan.valid])

    def bands(self, heads: list[int], plan: BandPlan) -> None:
        """The blocks of the plan, each with its own keys."""
        if not heads or not plan.index.shape[1]:
            return
        rows, blocks = plan.columns.shape[:2]
        query = _blocks(_take(_pick(self.query, heads), plan.index), blocks)
        key, value = (_blocks(_take(x, plan.columns.flatten(1)), blocks) for x in self._keys(heads))
        found = self._attend(query, key, value, attn_mask=plan.seen)
        found = found.unflatten(0, (rows, blocks)).transpose(2, 3).flatten(1, 2)
        self._put(plan.here, heads, found[plan.valid])

    def _keys(self, heads: list[int]) -> tuple[Tensor, Tensor]:
        groups = [head // self.group for head in heads]
        return _pick(self.key, groups), _pick(self.value, groups)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        found = scaled_dot_product_attention(query, key, value, **self.options, **options)
        return found.to(self.out.dtype)  # autocast rounds it

    def _put(self, here: Tensor, heads: list[int], found: Tensor) -> None:
        if len(heads) < self.out.shape[2]:
            some, found = found, self.out[here]
            found[:, heads] = some
        self.out[here] = found


def _pick(x: Tensor, heads: list[int]) -> Tensor:
    """Heads of (B, H, L, d); no copy for all of them."""
    return x if heads == list(range(x.shape[1])) else x[:, heads]


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B, R) of (B, H, L, d); whole rows of all heads are copied at once, unlike by ``gather``."""
    start = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[2]
    rows = x.transpose(1, 2).flatten(0, 1).index_select(0, (index + start).flatten())
    return rows.unflatten(0, index.shape).transpose(1, 2)


def _blocks(x: Tensor, blocks: int) -> Tensor:
    """(B, H, Q * T, d) to (B * Q, H, T, d)."""
    return x.unflatten(2, (blocks, -1)).transpose(1, 2).flatten(0, 1)
