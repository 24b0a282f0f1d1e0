# SPDX-License-Identifier: Apache-2.0
"""FlashAttention-2's two kernels in plain torch, under transformers' own flash code.

So its padding, packed-sequence and mask logic runs on a CPU. Only the kernels are stand-ins.
"""

from __future__ import annotations

import inspect

import torch
from transformers import modeling_flash_attention_utils as flash_utils

CALLS = []


def attend(q, k, v, causal, scale):
    q, k, v = (x.transpose(0, 1).float() for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    logits = q @ k.mT * scale
    if causal:  # aligned at the bottom right, as since flash-attn 2.1
        queries, keys = logits.shape[1:]
        future = torch.arange(keys)[None] > torch.arange(queries)[:, None] + keys - queries
        logits = logits.masked_fill(future, float("-inf"))
    return (logits.softmax(-1) @ v).transpose(0, 1)


def dense(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, **kwargs):
    CALLS.append("dense")
    scale = softmax_scale or q.shape[-1] ** -0.5
    return torch.stack([attend(*row, causal, scale) for row in zip(q, k, v, strict=True)]).to(q.dtype)


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, *args, softmax_scale=None, causal=False, **kwargs):
    CALLS.append("varlen")
    scale = softmax_scale or q.shape[-1] ** -0.5
    starts, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    spans = zip(starts, starts[1:], keys, keys[1:], strict=False)
    return torch.cat([attend(q[a:b], k[c:d], v[c:d], causal, scale) for a, b, c, d in spans]).to(q.dtype)


def arguments(is_causal=None, softmax_scale=None, max_seqlen_q=None, max_seqlen_k=None, **kwargs):
    out = {"causal": is_causal, "softmax_scale": softmax_scale}
    if max_seqlen_q is not None:
        out |= {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    return out


def install(monkeypatch, model):
    """Run ``model`` with ``flash_attention_2`` on the stand-in kernels."""
    source = inspect.getsource(flash_utils._flash_attention_forward)  # the tuple differs between versions
    padding = flash_utils._pad_input, flash_utils._unpad_input
    functions, process = (dense, varlen, None, *padding), (arguments, dict)
    if "flash_kvcache_fn" not in source:
        process = arguments
        if "flash_varlen_fn, _, pad_fn" not in source:
            functions = (dense, varlen, *padding)
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda *a, **k: (functions, process))
    CALLS.clear()
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation_internal"):
            module.config._attn_implementation_internal = "flash_attention_2"
