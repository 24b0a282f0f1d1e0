# SPDX-License-Identifier: Apache-2.0
"""BLIP-2, InstructBLIP and its sibling for clips: visual tokens are the queries of a Q-Former.

Their ``generate`` encodes, scatters and calls ``generate`` of the language model, past the ``forward`` of the model;
where it arrives there the visual tokens are announced. A query shows no part of the picture, so that there is nothing
that could be read of the tower or said of a token's place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from vtoken.adapters.base import SHORTENING, VIDEO, single_view, squarest_grid
from vtoken.adapters.generic import GenericAdapter
from vtoken.engine.tower import VisionRecord
from vtoken.ops.ragged import run_lengths

if TYPE_CHECKING:
    from vtoken.engine.hooks import AdapterHooks


class QFormerAdapter(GenericAdapter):
    """`transformers.Blip2ForConditionalGeneration` and the two InstructBLIPs, with a decoder-only language model."""

    model_types = ("blip-2", "instructblip", "instructblipvideo")
    answers = frozenset({"generate"})

    limits: ClassVar[Mapping[str, str]] = {SHORTENING: "takes pixels beside a prompt, and no features in their place"}
    outer_takes = ("attention_mask",)  # generate() hands the cache to the language model only

    def __init__(self, model: nn.Module) -> None:
        config: Any = getattr(model, "config", None)
        if getattr(getattr(config, "text_config", None), "is_encoder_decoder", False):
            raise TypeError(
                f"The language model of this {type(model).__name__} is an encoder-decoder model: its visual tokens are "
                "in the encoder, and the decoder that generates holds none that could be dropped."
            )
        super().__init__(model)
        self.generator = self.model.language_model

    @property
    def projector(self) -> nn.Module:
        raise ValueError(
            f"The visual tokens of {type(self.model).__name__} are the queries of a Q-Former, which show no part of a "
            "picture: use a reducer that does not look at the projector's input."
        )

    def read_block(self, layer: int | float) -> int:
        raise ValueError(
            f"The visual tokens of {type(self.model).__name__} are the queries of a Q-Former, which show no part of a "
            "picture: use a reducer that needs no encoder attention."
        )

    def install(self, hooks: AdapterHooks) -> None:
        super().install(hooks)
        if self.language_model.config.model_type == "opt":
            hooks.replace(self.generator, "forward", _placed)

        def make(original: Callable) -> Callable:
            def generate(*args: Any, **kwargs: Any) -> Any:
                embeds, ids = kwargs.get("inputs_embeds"), kwargs.get("input_ids")
                if embeds is None:
                    return original(*args, **kwargs)
                kinds = self.modality(ids, embeds if ids is None else None)
                if bool((kinds > 0).any()):
                    hooks.reader.observe(lambda: None)  # raises where a reducer wants what there is not
                    hooks.announce((kinds > 0).long(), self._record(kinds > 0, hooks), embeds[kinds > 0][0], None)
                return original(*args, **kwargs)

            return generate

        hooks.replace(self.generator, "generate", make)

    def _record(self, visual: Tensor, hooks: AdapterHooks) -> VisionRecord:
        """What is known of visual tokens at ``visual`` (B, S): how many a picture has, or the run of a clip."""
        if hooks.reader.resampler is not None:
            self.resampled("image", {}, [])
        queries, lengths = self.model.query_tokens.shape[1], run_lengths(visual)
        if wrong := [length for length in lengths if length % queries]:
            raise NotImplementedError(
                f"The prompt has {wrong[0]} placeholders in a row, which is no multiple of the {queries} queries of a "
                "picture: pass what the model's processor returns."
            )
        if self.placeholders[VIDEO] is None:
            lengths = [queries] * (sum(lengths) // queries)
        return VisionRecord(lengths, self.layouts("image", {}, lengths), {})

    def layouts(self, modality: str, call: dict[str, Any], lengths: list[int]) -> list[Any]:
        return [single_view(*squarest_grid(length)) for length in lengths]


def _placed(original: Callable) -> Callable:
    """OPT counts its positions by the mask, where these are not given; that must be the mask of the whole prompt."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        mask, embeds = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
        if kwargs.get("position_ids") is None and embeds is not None and isinstance(mask, Tensor) and mask.dim() == 2:
            kwargs["position_ids"] = (mask.long().cumsum(1) * mask.long() - 1)[:, -embeds.shape[1] :]
        return original(*args, **kwargs)

    return forward
