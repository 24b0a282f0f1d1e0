# SPDX-License-Identifier: Apache-2.0
"""Models of the original ``llava`` package and its descendants, recognised by their methods; nothing is imported.

Their ``prepare_inputs_labels_for_multimodal`` encodes, packs and scatters in one call. It is asked where tokens come
from by labels that number the prompt, and sent maps of the encoder as if they were features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtoken.adapters.base import Adapter, square_side
from vtoken.context import NEWLINE, ItemLayout
from vtoken.engine.tower import Observed, VisionRecord

if TYPE_CHECKING:
    from vtoken.engine.hooks import AdapterHooks

IGNORE = -100
METHOD = "prepare_inputs_labels_for_multimodal"


class OriginalLlavaAdapter(Adapter):
    """``LlavaLlamaForCausalLM`` and others with `METHOD`."""

    def __init__(self, model: Any) -> None:
        self.model, self.generator = model, model
        self.outer = None
        self.language_model = model.get_model()
        self.layers = self.language_model.layers

    @staticmethod
    def serves(model: nn.Module) -> bool:
        """Whether the model has the methods of the family."""
        return hasattr(model, METHOD) and hasattr(model, "get_model")

    @property
    def tower(self) -> Any:
        return self.model.get_vision_tower()

    @property
    def projector(self) -> nn.Module:
        return self.language_model.mm_projector

    def tower_groups(self, patches: int, modality: str) -> Tensor:
        return torch.arange(patches, device="cpu")

    def install(self, hooks: AdapterHooks) -> None:
        def make(original: Callable) -> Callable:
            def prepare(input_ids, position_ids, attention_mask, past_key_values, labels, images, *args, **kwargs):
                if images is None or input_ids.shape[1] == 1:
                    return original(
                        input_ids, position_ids, attention_mask, past_key_values, labels, images, *args, **kwargs
                    )
                mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
                source = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)

                def run() -> Any:
                    return original(input_ids, position_ids, mask, past_key_values, source, images, *args, **kwargs)

                seen = hooks.reader.observe(run)
                _, positions, new_mask, past, embeds, origin = seen.output
                visual = (origin == IGNORE) & new_mask.bool()
                record = _Packing(self.model, run, visual, images).record(seen, self.leading_tokens)
                if labels is not None:
                    labels = torch.where(origin >= 0, labels.gather(1, origin.clamp(min=0)), IGNORE)
                if bool(visual.any()):
                    hooks.announce(visual.long(), record, embeds[visual][0], labels)
                return None, positions, None if attention_mask is None else new_mask, past, embeds, labels

            return prepare

        hooks.replace(self.model, METHOD, make)


class _Packing:
    """Sends per-patch maps (views, patches, C) through the model's own packing."""

    def __init__(self, model: Any, run: Callable, visual: Tensor, images: Any) -> None:
        self.model, self.run, self.visual = model, run, visual
        single = isinstance(images, Tensor) and images.dim() == 4
        self.views = [1] * len(images) if single else [len(image) if image.dim() == 4 else 1 for image in images]

    def record(self, seen: Observed, skip: int) -> VisionRecord:
        lengths, layouts = self._layouts()
        maps, dropped = seen.packed(lambda parts: self._pack(torch.cat(parts)), skip)
        inputs = self._pack(torch.cat(seen.inputs)) if seen.inputs else None
        return VisionRecord(lengths, layouts, maps, inputs, dropped)

    def _layouts(self) -> tuple[list[int], list[ItemLayout]]:
        side = square_side(int(self.model.get_vision_tower().num_patches))
        index = torch.arange(side**2, device="cpu")
        owner = torch.cat([torch.full((count,), image, device="cpu") for image, count in enumerate(self.views)])
        inside = torch.cat([torch.arange(count, device="cpu") for count in self.views])
        place = torch.stack([owner.repeat_interleave(side**2), inside.repeat_interleave(side**2)], 1)
        place = torch.cat([place, torch.stack([index // side, index % side], 1).repeat(len(owner), 1)], 1)
        packed = self._pack(place.float().view(len(owner), side**2, 4)).cpu()
        newline = packed[:, 0].isnan()
        position = torch.arange(len(packed), device="cpu")
        last = torch.where(newline, 0, position).cummax(0).values  # a newline belongs to what it ends
        image = packed[last, 0].long()
        packed = packed.nan_to_num(0.0).long()
        lengths = torch.bincount(image, minlength=len(self.views)).tolist()
        columns = torch.where(newline, NEWLINE, packed[:, 1]), packed[:, 2], packed[:, 3]
        parts = zip(*(column.split(lengths) for column in columns), self.views, strict=True)
        grids = ((side, side),)
        return lengths, [ItemLayout(v, r, c, grids * n, thumbnail=0 if n > 1 else None) for v, r, c, n in parts]

    @torch.no_grad()
    def _pack(self, values: Tensor) -> Tensor:
        """(views, patches, C) to (T, C), NaN for newlines."""
        width = self.model.get_input_embeddings().weight.shape[1]
        out = [self._send(part, width)[:, : part.shape[-1]] for part in values.split(width, -1)]
        return torch.cat(out, 1).float()

    def _send(self, part: Tensor, width: int) -> Tensor:
        part = torch.nn.functional.pad(part, (0, width - part.shape[-1])).to(self.model.dtype)
        newline: Any = getattr(self.model.get_model(), "image_newline", None)
        kept: Any = None if newline is None else newline.data
        own = vars(self.model).get("encode_images")
        self.model.encode_images = lambda *args, **kwargs: part
        try:
            if newline is not None:
                newline.data = torch.full_like(kept, float("nan"))
            return self.run()[4][self.visual]
        finally:
            if own is None:
                del self.model.encode_images
            else:
                self.model.encode_images = own
            if newline is not None:
                newline.data = kept
