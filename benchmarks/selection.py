# SPDX-License-Identifier: Apache-2.0
"""Greedy selections against the plain loop over a full matrix of cosines; writes benchmarks/results/selection.json.

The headline is real features (`data/`): two photographs, as a pretrained tower gives them, and through a random GELU
projector; on a quiet machine, and beside two processes that multiply matrices in two threads each, which are started
and stopped here. Every selection is timed in turn with its baseline (`baselines.py`), with the same picks.

A selection is evaluated lazily only if that takes at most half of the baseline's time on real features and is not
slower beside other processes. The others are that plain loop: one product, and picks in one thread where each reads
little.

Then: Gaussian and clustered features, several pictures of unequal size at once, and memory; and vispruner's thinning
at keep 0.25, half of it by attention, against its own plain loop.

    python benchmarks/selection.py
    python benchmarks/selection.py --thinning   # that alone; the rest of the report stays
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines import BASELINES, WEIGHTED, thinning
from harness import RESULTS, arguments, race, round_times, save, summary
from torch import Tensor
from torch.nn.functional import gelu

from vtoken import ops
from vtoken.profile.memory import LiveBytes, peak_bytes
from vtoken.reducers.otprune import unit_channels
from vtoken.reducers.vispruner import thin

DATA = Path(__file__).parent / "data" / "real_features.npz"
PHOTOGRAPHS = ("astronaut", "coffee")
TOKENS, WIDTH, SHARE = 2880, 4096, 10  # a token of so many is picked
CLUSTERS = 40
GAMMA = 0.01  # otprune's
LAZY = ("k_center", "mmr", "sads", "coverage")
SLOW = ("coverage",)  # whose baseline takes seconds: one round
NEIGHBOURS = 2
BUSY = """
import os
import torch
torch.set_num_threads(2)
a, parent = torch.randn(1024, 1024), os.getppid()
print("busy", flush=True)
while os.getppid() == parent:
    a @ a
"""


@contextlib.contextmanager
def neighbours(count: int = NEIGHBOURS) -> Iterator[None]:
    """Beside so many processes that keep two threads busy."""
    started = [subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def real(tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Features (1, N, 384) of two photographs and the attention (1, N) that each patch receives."""
    with np.load(DATA) as data:
        parts = [np.concatenate([data[f"{name}_{what}"] for name in PHOTOGRAPHS]) for what in ("features", "received")]
    x, w = (torch.from_numpy(part).float()[None, :tokens] for part in parts)
    return x, w


def projected(x: Tensor, width: int) -> Tensor:
    """(B, N, width): through a random projector of two layers, as LLaVA has one."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(size, width, generator=generator) / size**0.5 for size in (x.shape[2], width))
    return gelu(x @ first) @ second


def features(kind: str, tokens: int, width: int, seed: int = 0) -> Tensor:
    """(1, N, D): independent directions, or clusters as the patches of one object form them."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, tokens, width, generator=generator)
    if kind == "gaussian":
        return noise
    centres = torch.randn(CLUSTERS, width, generator=generator)
    return centres[torch.randint(CLUSTERS, (1, tokens), generator=generator)] + 0.5 * noise


def weights(tokens: int) -> Tensor:
    """(1, N) importance."""
    return torch.rand(1, tokens, generator=torch.Generator().manual_seed(1)) + 0.01


def calls(name: str, x: Tensor, w: Tensor, k: Any, valid: Tensor | None = None) -> tuple[Any, Any]:
    """The baseline, row by row, and ours on the batch."""
    extra = (w,) if name in WEIGHTED else ()
    more = (GAMMA,) if name == "log_det" else ()
    counts = [k] * len(x) if isinstance(k, int) else k.tolist()
    valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if valid is None else valid
    if name == "log_det":  # as otprune gives it
        x = unit_channels(x, valid)
    rows = [(x[b][mask], *(e[b][mask] for e in extra)) for b, mask in enumerate(valid)]
    baseline = BASELINES[name]
    return (
        lambda: [baseline(*row, count, *more) for row, count in zip(rows, counts, strict=True)],
        lambda: getattr(ops, name)(x, *extra, k, *more, valid=valid),
    )


def same_picks(plain: list[Tensor], found: Tensor) -> float:
    """Share of the baseline's picks that ours are, as sets."""
    pairs = zip(plain, found, strict=True)
    shared = [len(set(a.tolist()) & set(b.tolist())) / len(a) for a, b in pairs]
    return min(shared)


def compare(name: str, x: Tensor, w: Tensor, k: Any, args: Any, valid: Tensor | None = None) -> dict[str, Any]:
    """Times of baseline and ours, shared picks, and peak memory of both."""
    plain, ours = calls(name, x, w, k, valid)
    rounds, warmup = (1, 0) if name in SLOW else (args.rounds, 1)
    times = round_times({"baseline": plain, "vtoken": ours}, rounds, args.device, warmup)
    found = summary(times)
    for side, spread in found.items():
        spread["least"] = min(times[side])
    with LiveBytes() as tracker:
        picks = ours()
    memory = {"baseline": 0 if name in SLOW else peak_bytes(plain, x.device), "vtoken": tracker.peak}
    return {**found, "same_picks": same_picks(plain(), picks), "peak_bytes": memory}


def real_features(args: Any, names: Any = tuple(BASELINES)) -> dict[str, Any]:
    """Every selection on real features, projected and raw."""
    raw, w = real(300 if args.quick else None)
    kinds = {"projected": projected(raw, 64 if args.quick else WIDTH), "raw": raw}
    found: dict[str, Any] = {}
    for kind, x in kinds.items():
        for name in names:
            k = x.shape[1] // SHARE
            found.setdefault(name, {})[kind] = one = compare(name, x.to(args.device), w.to(args.device), k, args)
            _say(f"{name} {kind}", one)
    return found


def synthetic(tokens: int, width: int, args: Any) -> dict[str, Any]:
    """Gaussian and clustered features, and four clustered pictures of unequal size, a tenth of each."""
    found: dict[str, Any] = {}
    names = [name for name in BASELINES if name not in SLOW]
    for kind in ("gaussian", "clusters"):
        x, w = features(kind, tokens, width).to(args.device), weights(tokens).to(args.device)
        for name in names:
            found.setdefault(name, {})[kind] = one = compare(name, x, w, tokens // SHARE, args)
            _say(f"{name} {kind}", one)
    some = tokens // 4
    x = torch.cat([features("clusters", some, width, seed) for seed in range(4)]).to(args.device)
    lengths = torch.tensor([some, some // 2, some // 5, some - 7])
    valid = (torch.arange(some) < lengths[:, None]).to(args.device)
    w, k = weights(some).expand(4, -1).to(args.device), (lengths // SHARE).clamp(min=1).to(args.device)
    for name in names:
        found[name]["unequal"] = one = compare(name, x, w, k, args, valid)
        _say(f"{name} unequal", one)
    return found


def thinned(args: Any) -> dict[str, Any]:
    """vispruner's thinning of real features to an eighth, the other eighth being chosen by attention before.

    Rounds of sorted similarities, many nearly equal, part by rounding errors: vectors of the authors' code are compared
    in the tests, picks here are not.
    """
    raw, w = real(300 if args.quick else None)
    found: dict[str, Any] = {}
    for kind, x in {"projected": projected(raw, 64 if args.quick else WIDTH), "raw": raw}.items():
        order = w.argsort(dim=1, descending=True, stable=True)
        target = x.shape[1] // 8
        rest, valid, k = order[:, target:], torch.ones_like(w, dtype=torch.bool), torch.tensor([target])
        plain, ours = partial(thinning, x[0], rest[0], target), partial(thin, x, rest, k, valid)
        found[kind] = race({"baseline": plain, "vtoken": ours}, args.rounds)
        times = [found[kind][side]["median"] for side in ("baseline", "vtoken")]
        print(f"thinning {kind}: {times[0]:.0f} -> {times[1]:.0f} ms")
    return found


def main() -> None:
    """Measure everything."""
    args = arguments(__doc__, ("thinning",))
    if args.thinning:
        known = json.loads((args.out or RESULTS / "selection.json").read_text(encoding="utf-8"))["results"]
        save("selection", {**known, "thinning": thinned(args)}, args)
        return
    tokens, width = (192, 64) if args.quick else (TOKENS, WIDTH)
    results: dict[str, Any] = {
        "tokens": {"real": real(300 if args.quick else None)[0].shape[1], "synthetic": tokens},
        "width": {"projected": width, "raw": 384, "synthetic": width},
        "share": 1 / SHARE,
        "neighbours": NEIGHBOURS,
        "lazy": LAZY,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "quiet": real_features(args),
    }
    print(f"beside {NEIGHBOURS} processes of two threads:", flush=True)
    with neighbours():
        results["busy"] = real_features(args)
    more = {"synthetic": synthetic(tokens, width, args), "thinning": thinned(args)}
    save("selection", {**results, **more}, args)


def _say(what: str, found: dict[str, Any]) -> None:
    ours, memory = found["vtoken"], found["peak_bytes"]
    print(
        f"{what:22} {found['baseline']['median']:8.1f} -> {ours['median']:7.1f} ms {ours['speedup']:5.2f}x  "
        f"same picks {found['same_picks']:.3f}  peak {memory['baseline'] / 2**20:.0f} -> {memory['vtoken'] / 2**20:.0f} MiB",  # noqa: E501
        flush=True,
    )


if __name__ == "__main__":
    main()
