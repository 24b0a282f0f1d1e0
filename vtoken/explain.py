# SPDX-License-Identifier: Apache-2.0
"""Which visual tokens an answer rests on: gradient x attention rollout through the decoder (arXiv 2506.01097).

The paper names a transformer-explainability method without its formula; this is the one of Chefer et al.
(arXiv 2103.15679, Eq. 5 and 6) for self-attention. It needs a backward pass and full attention matrices of the
decoder, so it is an oracle for studies and training, not a reducer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.adapters import Adapter, adapter_for
from vtoken.context import VisualContext
from vtoken.observe import Observe
from vtoken.wrapping import reduce

IGNORED = -100


def relevance(model: nn.Module, inputs: Mapping[str, Any], targets: Tensor | None = None) -> list[Tensor]:
    """Relevance of every visual token for what the model says next.

    From the last layer to the first, ``r <- r + r mean_h(relu(dy/dA * A))``, beginning with 1 at the positions that
    predict the answer, where y is the sum of the answer's logits. The decoder computes with eager attention meanwhile
    (B x heads x S x S numbers a layer), and with its own again after.

    Parameters
    ----------
    model : nn.Module
        An unwrapped model that `vtoken.adapters` knows.
    inputs : mapping
        What the model's processor returned, with the answer's tokens but the last behind the prompt if ``targets``
        are given.
    targets : Tensor, optional
        (B, T) long: the tokens that the last T positions should predict, -100 where there is none. By default the
        token that the model predicts after the prompt, for which padding has to be on the left.

    Returns
    -------
    list of Tensor
        (N,) float32, not negative, for each image or clip in the order of the batch.

    Raises
    ------
    ValueError
        If the model is wrapped.
    NotImplementedError
        If the decoder has layers without attention matrices.
    """
    adapter, seen = adapter_for(model), list[VisualContext]()
    with contextlib.ExitStack() as stack:
        stack.enter_context(reduce(model, Observe(seen.append)))
        weights = stack.enter_context(_recorded(adapter))
        stack.enter_context(torch.no_grad())  # the decoder switches gradients on, the tower needs none
        logits = model(**{**inputs, "use_cache": False}).logits
        targets = logits[:, -1:].argmax(-1) if targets is None else targets.to(logits.device)
        asked = targets != IGNORED
        said = logits[:, -targets.shape[1] :].float().gather(2, targets.clamp(min=0)[..., None])[..., 0]
        gradients = torch.autograd.grad((said * asked).sum(), weights, allow_unused=True)
    start = torch.zeros(logits.shape[:2], device=logits.device)
    start[:, -targets.shape[1] :] = asked / asked.sum(1, keepdim=True).clamp(min=1)
    ctx = seen[0]
    found = ctx.per_item(roll_out(start, weights, gradients)[..., None])[..., 0]
    return [row[:length] for row, length in zip(found, ctx.tokens.tolist(), strict=True)]


def roll_out(start: Tensor, weights: list[Tensor], gradients: tuple[Tensor | None, ...]) -> Tensor:
    """(B, S): relevance of every position for those of ``start`` (B, S).

    Parameters
    ----------
    start : Tensor
        Weight of the positions whose prediction is explained.
    weights, gradients : list of Tensor
        (B, H, S, S) attention of each layer and the gradient with respect to it, None for a layer without influence.
    """
    found = start
    for attention, gradient in zip(reversed(weights), reversed(gradients), strict=True):
        if gradient is not None:
            step = (gradient.float() * attention.detach().float()).clamp(min=0).mean(1).to(found.device)
            found = found + torch.einsum("bs,bst->bt", found, step)
    return found


@contextlib.contextmanager
def _recorded(adapter: Adapter) -> Iterator[list[Tensor]]:
    """While open, the decoder attends eagerly, with gradients; yields the attention matrices of its layers."""
    language, weights = adapter.language_model, list[Tensor]()
    before = language.config._attn_implementation

    def fresh(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        weights.clear()
        torch.set_grad_enabled(True)
        return args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"].detach().requires_grad_()}

    def collect(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        if not isinstance(output, tuple) or output[1] is None:
            raise NotImplementedError(f"The attention of {name} returns no matrix, so its relevance is not defined.")
        weights.append(output[1])

    with contextlib.ExitStack() as stack:
        stack.callback(language.set_attn_implementation, before)
        language.set_attn_implementation("eager")
        stack.callback(language.register_forward_pre_hook(fresh, with_kwargs=True).remove)
        for index, layer in enumerate(adapter.layers):
            if not adapter.has_attention(layer):
                raise NotImplementedError(
                    f"Layer {index} of {type(language).__name__} is recurrent and has no attention matrix: relevance "
                    "is defined for decoders whose layers all attend."
                )
            hook = functools.partial(collect, f"layer {index}")
            stack.callback(adapter.attention(layer).register_forward_hook(hook).remove)
        yield weights
