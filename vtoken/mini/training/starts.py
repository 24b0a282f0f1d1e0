# SPDX-License-Identifier: Apache-2.0
"""How a vision tower with small patches begins: random weights take far longer to see edges and neighbours."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

GELU = 1.702  # gelu(z) is nearly z * sigmoid(1.702 z)
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


def _enlarged(source: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(width, 3, side / 2, side / 2) patch embedding that sees a patch as CLIP sees it enlarged; (width, width) fold.

    CLIP has a norm before its first layer, the others have none: the fold is that norm, with one deviation for all
    patches.
    """
    old, norm = source.embeddings, source.pre_layrnorm
    patch = old.patch_embedding.weight
    width, side = len(patch), patch.shape[-1]
    halved = patch.view(width, 3, side // 2, 2, side // 2, 2).sum((3, 5))
    states = F.conv2d(pixels, halved, stride=side // 2).flatten(2).mT + old.position_embedding.weight[1:]
    centred = norm.weight[:, None] * _centring(width)
    return halved, centred / states.std(-1, correction=0).mean()


def _centring(width: int) -> torch.Tensor:
    return torch.eye(width) - 1 / width


@torch.no_grad()
def transplant(tower: Any, source: Any, pixels: torch.Tensor) -> None:
    """Start an InternViT as a CLIP tower of the same grid whose patches are twice as wide.

    Parameters
    ----------
    tower : nn.Module
        InternViT; changed.
    source : nn.Module
        CLIP.
    pixels : Tensor
        (B, 3, side, side) pictures that tell the usual deviation of a patch.
    """
    halved, fold = _enlarged(source, pixels)
    old, new, norm = source.embeddings, tower.embeddings, source.pre_layrnorm
    table, projection = old.position_embedding.weight, new.patch_embeddings.projection
    projection.weight.copy_((fold @ halved.flatten(1)).view_as(halved))
    projection.bias.zero_()
    new.position_embeddings[0] = table @ fold.T + norm.bias
    first = norm(old.class_embedding + table[0])
    new.cls_token[0, 0] = first - new.position_embeddings[0, 0]
    for layer, copied in zip(tower.encoder.layer, source.encoder.layers, strict=False):
        layer.lambda_1.fill_(1.0)
        layer.lambda_2.fill_(1.0)
        for name, old_name in _NAMES.items():
            layer.get_submodule(name).load_state_dict(copied.get_submodule(old_name).state_dict())


@torch.no_grad()
def transplant_rotary(tower: Any, source: Any, pixels: torch.Tensor) -> None:
    """Start a Qwen2.5-VL tower as a CLIP tower whose patches are twice as wide.

    What the two have in common is copied exactly: RMSNorm is LayerNorm where everything that is added has mean zero,
    biases of a norm move into the next map, and a gate of ``silu(1.702 z)`` with a constant other side is nearly
    ``gelu(z)``. CLIP's absolute positions have no place in it.

    Parameters
    ----------
    tower : nn.Module
        Of Qwen2.5-VL; changed.
    source : nn.Module
        CLIP.
    pixels : Tensor
        (B, 3, side, side) pictures that tell the usual deviation of a patch.
    """
    halved, fold = _enlarged(source, pixels)
    still = _centring(len(halved))
    frames = tower.patch_embed.proj.weight.shape[2]
    filters = (still @ fold @ halved.flatten(1)).view_as(halved) / frames
    tower.patch_embed.proj.weight.copy_(filters[:, :, None].expand_as(tower.patch_embed.proj.weight))
    for block, copied in zip(tower.blocks, source.encoder.layers, strict=False):
        block.norm1.weight.copy_(copied.layer_norm1.weight)
        block.norm2.weight.copy_(copied.layer_norm2.weight)
        attention = copied.self_attn
        maps = (attention.q_proj, attention.k_proj, attention.v_proj)
        _copy(block.attn.qkv, torch.cat([m.weight for m in maps]), torch.cat([m.bias for m in maps]))
        block.attn.qkv.bias += block.attn.qkv.weight @ copied.layer_norm1.bias
        _copy(block.attn.proj, still @ attention.out_proj.weight, still @ attention.out_proj.bias)
        _copy(block.mlp.gate_proj, GELU * copied.mlp.fc1.weight, GELU * copied.mlp.fc1.bias)
        block.mlp.gate_proj.bias += block.mlp.gate_proj.weight @ copied.layer_norm2.bias
        _copy(block.mlp.up_proj, torch.zeros_like(block.mlp.up_proj.weight), torch.tensor(1 / GELU))
        _copy(block.mlp.down_proj, still @ copied.mlp.fc2.weight, still @ copied.mlp.fc2.bias)


def _copy(linear: torch.nn.Linear, weight: torch.Tensor, bias: torch.Tensor) -> None:
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
