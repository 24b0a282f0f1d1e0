# SPDX-License-Identifier: Apache-2.0
"""How a vision tower with small patches begins: random weights take far longer to see edges and neighbours."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

_NAMES = {
    "layernorm_before": "layer_norm1",
    "layernorm_after": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.projection_layer": "self_attn.out_proj",
}


@torch.no_grad()
def transplant(tower: Any, source: Any, pixels: torch.Tensor) -> None:
    """Start an InternViT as a CLIP tower of the same grid whose patches are twice as wide.

    A patch is seen as CLIP sees it enlarged, and the layers are copied. InternViT has no norm before its first layer:
    the norm is folded into the embeddings, with one deviation for all patches.

    Parameters
    ----------
    tower : nn.Module
        InternViT; changed.
    source : nn.Module
        CLIP.
    pixels : Tensor
        (B, 3, side, side) pictures that tell the usual deviation.
    """
    old, new, norm = source.embeddings, tower.embeddings, source.pre_layrnorm
    patch, table = old.patch_embedding.weight, old.position_embedding.weight
    width, side = len(patch), patch.shape[-1]
    halved = patch.view(width, 3, side // 2, 2, side // 2, 2).sum((3, 5))
    states = F.conv2d(pixels, halved, stride=side // 2).flatten(2).mT + table[1:]
    centred = norm.weight[:, None] * (torch.eye(width) - 1 / width)
    fold = centred / states.std(-1, correction=0).mean()
    projection = new.patch_embeddings.projection
    projection.weight.copy_((fold @ halved.flatten(1)).view_as(halved))
    projection.bias.zero_()
    new.position_embeddings[0] = table @ fold.T + norm.bias
    first = old.class_embedding + table[0]
    new.cls_token[0, 0] = centred @ first / first.std(correction=0) + norm.bias - new.position_embeddings[0, 0]
    for layer, copied in zip(tower.encoder.layer, source.encoder.layers, strict=False):
        layer.lambda_1.fill_(1.0)
        layer.lambda_2.fill_(1.0)
        for name, old_name in _NAMES.items():
            layer.get_submodule(name).load_state_dict(copied.get_submodule(old_name).state_dict())


@torch.no_grad()
def whiten(projection: Any, patches: torch.Tensor, scale: float = 0.3, floor: float = 0.02) -> None:
    """Start a patch embedding without bias as the whitened principal components of ``patches`` (M, pixels).

    Brightness is most of what patches differ in; this way edges count as much from the first step on.
    """
    width = projection.out_channels
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    values, vectors = values.flip(0)[:width], vectors.flip(1)[:, :width]
    whitened = vectors * (values + floor * values.mean()).rsqrt() * scale
    turned = torch.linalg.qr(torch.randn(width, width)).Q
    projection.weight.copy_((whitened @ turned).T.view_as(projection.weight))
