# SPDX-License-Identifier: Apache-2.0
"""Greedy selections against the plain loop over a full matrix of cosines; writes benchmarks/results/selection.json.

Every selection is timed in turn with its baseline (`baselines.py`) on Gaussian and on clustered features, with the
same picks. Then: several pictures of unequal size at once, other numbers of tokens, and memory.

A CPU with AVX-512 multiplies whole matrices about twice as fast as one with AVX2, but matrices by few vectors, as
selections do, hardly faster: memory is as slow. So there, one picture is also timed with AVX2 alone, in a process of
its own.

Two selections have less to save than the others on such features:

* `max_sum`: a sum of cosines rises and falls, so that no old score bounds a new one and each pick has to be compared
  with all tokens. Drafts of 16 picks hold for about a dozen; on features of low rank hardly for one, and all cosines
  are computed.
* `max_min` on Gaussian features: all tokens are almost equally isolated, so that few leave the race for the first pick
  early.

    python benchmarks/selection.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from baselines import BASELINES, WEIGHTED
from harness import arguments, geometric_mean, race, save
from torch import Tensor

from vtoken import ops
from vtoken.profile.memory import LiveBytes, peak_bytes

TOKENS, WIDTH, PICKS = 2880, 4096, 288
CLUSTERS = 40
RANK = 64
AVX2 = {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
"""What MKL, oneDNN and torch read when they are loaded."""


def features(kind: str, tokens: int, width: int, seed: int = 0) -> Tensor:
    """(1, N, D): independent directions, clusters as the patches of one object form them, or few directions."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, tokens, width, generator=generator)
    if kind == "gaussian":
        return noise
    if kind == "low rank":
        few = torch.randn(1, tokens, RANK, generator=generator) @ torch.randn(RANK, width, generator=generator)
        return few / RANK**0.5 + 0.1 * noise
    centres = torch.randn(CLUSTERS, width, generator=generator)
    return centres[torch.randint(CLUSTERS, (1, tokens), generator=generator)] + 0.5 * noise


def weights(tokens: int) -> Tensor:
    """(1, N) importance."""
    return torch.rand(1, tokens, generator=torch.Generator().manual_seed(1)) + 0.01


def calls(name: str, x: Tensor, w: Tensor, k: Any, valid: Tensor | None = None) -> tuple[Any, Any]:
    """The baseline, row by row, and ours on the batch."""
    extra = (w,) if name in WEIGHTED else ()
    counts = [k] * len(x) if isinstance(k, int) else k.tolist()
    valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if valid is None else valid
    rows = [(x[b][mask], *(e[b][mask] for e in extra)) for b, mask in enumerate(valid)]
    baseline = BASELINES[name]
    return (
        lambda: [baseline(*row, count) for row, count in zip(rows, counts, strict=True)],
        lambda: getattr(ops, name)(x, *extra, k, valid=valid),
    )


def same_picks(plain: list[Tensor], found: Tensor) -> float:
    """Share of the baseline's picks that ours are, as sets."""
    pairs = zip(plain, found, strict=True)
    shared = [len(set(a.tolist()) & set(b.tolist())) / len(a) for a, b in pairs]
    return min(shared)


def compare(name: str, x: Tensor, w: Tensor, k: Any, args: Any, valid: Tensor | None = None) -> dict[str, Any]:
    """Times of baseline and ours, shared picks, and peak memory of both."""
    plain, ours = calls(name, x, w, k, valid)
    times = race({"baseline": plain, "vtoken": ours}, 1 if name == "coverage" else args.rounds, args.device)
    with LiveBytes() as tracker:
        ours()
    return {
        "baseline": times["baseline"],
        "vtoken": times["vtoken"],
        "same_picks": same_picks(plain(), ours()),
        "peak_bytes": {"baseline": peak_bytes(plain, x.device), "vtoken": tracker.peak, "largest": tracker.largest},
    }


def ragged(tokens: int, width: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four pictures of unequal size: features, weights, valid, a tenth of each."""
    x = torch.cat([features("clusters", tokens, width, seed) for seed in range(4)]).to(device)
    lengths = torch.tensor([tokens, tokens // 2, tokens // 5, tokens - 7])
    valid = (torch.arange(tokens) < lengths[:, None]).to(device)
    return x, weights(tokens).expand(4, -1).to(device), valid, (lengths // 10).clamp(min=1).to(device)


def one_picture(tokens: int, width: int, picks: int, args: Any) -> dict[str, Any]:
    """Every selection on one picture of each kind, and its mean speed-up."""
    one: dict[str, Any] = {}
    for kind in ("gaussian", "clusters"):
        x, w = features(kind, tokens, width).to(args.device), weights(tokens).to(args.device)
        for name in BASELINES:
            found = compare(name, x, w, picks, args)
            one.setdefault(name, {})[kind] = found
            _say(f"{name} {kind}", found)
    speedup = {name: geometric_mean([one[name][kind]["vtoken"]["speedup"] for kind in one[name]]) for name in one}
    return {"one": one, "speedup": speedup}


def others(tokens: int, width: int, picks: int, args: Any) -> dict[str, Any]:
    """Features of low rank, unequal pictures, and other numbers of tokens."""
    results: dict[str, Any] = {part: {} for part in ("low_rank", "ragged", "sweep")}
    x, w = features("low rank", tokens, width).to(args.device), weights(tokens).to(args.device)
    for name in (name for name in BASELINES if name != "coverage"):  # its loop takes seconds
        results["low_rank"][name] = found = compare(name, x, w, picks, args)
        _say(f"{name} low rank", found)
    for name in BASELINES:
        x, w, valid, k = ragged(tokens // 4, width, args.device)
        results["ragged"][name] = found = compare(name, x, w, k, args, valid)
        _say(f"{name} ragged", found)
    for count in (96, 192) if args.quick else (576, 1152, 2304, 4608):
        x, w = features("clusters", count, width).to(args.device), weights(count).to(args.device)
        for name in ("k_center", "mmr"):
            found = compare(name, x, w, count // 10, args)
            results["sweep"].setdefault(name, {})[count] = found
            _say(f"{name} N={count}", found)
    return results


def with_avx2(args: Any) -> dict[str, Any]:
    """`one_picture` in a process without AVX-512."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "avx2.json"
        options = ["--threads", args.threads, "--rounds", args.rounds, "--out", out, *["--quick"] * args.quick]
        command = [sys.executable, __file__, "--one", *map(str, options)]
        print("with AVX2 alone:", flush=True)
        subprocess.run(command, check=True, env={**os.environ, **AVX2})
        return json.loads(out.read_text(encoding="utf-8"))["results"]


def main() -> None:
    """Measure everything."""
    args = arguments(__doc__, ["one"])
    tokens, width, picks = (192, 64, 19) if args.quick else (TOKENS, WIDTH, PICKS)
    results: dict[str, Any] = {"tokens": tokens, "width": width, "picks": picks}
    results |= {"cpu": torch.backends.cpu.get_cpu_capability(), **one_picture(tokens, width, picks, args)}
    if not args.one:
        results |= others(tokens, width, picks, args)
        if args.device == "cpu" and results["cpu"] == "AVX512":
            results["avx2"] = with_avx2(args)
    save("selection", results, args)


def _say(what: str, found: dict[str, Any]) -> None:
    ours, memory = found["vtoken"], found["peak_bytes"]
    print(
        f"{what:22} {found['baseline']['median']:8.1f} -> {ours['median']:7.1f} ms {ours['speedup']:5.2f}x  "
        f"same picks {found['same_picks']:.3f}  peak {memory['baseline'] / 2**20:.0f} -> {memory['vtoken'] / 2**20:.0f} MiB",  # noqa: E501
        flush=True,
    )


if __name__ == "__main__":
    main()
