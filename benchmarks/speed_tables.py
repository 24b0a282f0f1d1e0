# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/speed.md, each from the committed JSON of one benchmark.

A target stands beside what was measured, met or missed. What was not measured yet says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from tabular import markdown

MIB = 2**20


def target(value: float, limit: float, shown: str, at_most: bool = False) -> str:
    """``shown``, what was wanted, and whether it was reached."""
    met = value <= limit if at_most else value >= limit
    return f"{shown}: {'met' if met else '**missed**'}"


def bounded(bounds: Sequence[float], limit: float, shown: str) -> str:
    """As `target`, for a median with its confidence interval: undecided where the interval holds the limit."""
    _, low, high = bounds
    return f"{shown}: {'met' if high <= limit else '**missed**' if low > limit else 'undecided'}"


def with_interval(bounds: Sequence[float], factor: float, digits: int, unit: str) -> str:
    """A median and its confidence interval."""
    middle, low, high = (f"{factor * value:+.{digits}f}" for value in bounds)
    return f"{middle} {unit} ({low} to {high})"


def ms(spread: Mapping[str, float]) -> str:
    """Median ± half of the interquartile range, in milliseconds."""
    return f"{_short(spread['median'], 3)} ± {_short(spread['iqr'] / 2, 2)}"


def _short(value: float, digits: int) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.{digits}g}"


def selection(found: dict) -> str:
    """Greedy selections next to the plain loop over all cosines, on real features first."""
    rows = []
    for name, quiet in found["quiet"].items():
        busy, other, lazy = found["busy"][name], found["synthetic"].get(name, {}), name in found["lazy"]
        every = [*quiet.values(), *busy.values(), *other.values()]
        measured = [f"{ms(one['baseline'])} -> {ms(one['vtoken'])}" for one in quiet.values()]
        speeds = [
            [one["vtoken"]["speedup"] for one in part] for part in (quiet.values(), busy.values(), other.values())
        ]
        measured += [_wanted(speedup, 2.0) if lazy else f"{speedup:.2f}x" for speedup in speeds[0]]
        measured += [_wanted(speedup, 1.0) if lazy else f"{speedup:.2f}x" for speedup in speeds[1]]
        measured += [f"{speedup:.2f}x" for speedup in speeds[2]] or [""] * 3
        peaks = [quiet["projected"]["peak_bytes"][side] / MIB for side in ("baseline", "vtoken")]
        memory = f"{peaks[0]:.0f} -> {peaks[1]:.0f}" if peaks[0] else f"{peaks[1]:.0f}"
        same = min(one["same_picks"] for one in every)
        rows.append([f"`{name}`", "lazily" if lazy else "plain table", *measured, f"{100 * same:.0f} %", memory])
    kinds = ("projected", "raw")
    columns = ["", "how", *(f"ms, {kind}" for kind in kinds), *kinds, *(f"{kind}, busy" for kind in kinds)]
    columns += ["Gaussian", "clusters", "unequal pictures", "same picks", "peak MiB"]
    tokens, width = found["tokens"], found["width"]
    widths = " and ".join(str(width[kind]) for kind in kinds)
    size = (
        f"Real features: N = {tokens['real']}, d = {widths}, k = {100 * found['share']:.0f} %, float32; busy: beside "
        f"{found['neighbours']} processes of two threads each. The speed-up of lazy evaluation has to reach 2x, and 1x "
        "beside others; the plain table is what it is compared with. Gaussian and clustered: "
        f"N = {tokens['synthetic']}, d = {width['synthetic']}; unequal: four pictures of up to "
        f"{tokens['synthetic'] // 4} tokens in one batch."
    )
    thinned = "; ".join(
        f"{ms(one['baseline'])} -> {ms(one['vtoken'])} ms, d = {width[kind]}" for kind, one in found["thinning"].items()
    )
    return f"{markdown(columns, rows, text_columns=2)}\n{size} `vispruner`'s thinning of the same tokens: {thinned}."


def _wanted(speedup: float, limit: float) -> str:
    return f"{speedup:.2f}x" if speedup >= limit else f"{speedup:.2f}x: **missed**"


def prefill(found: dict) -> str:
    """Prefill time, and how much of what the arithmetic allows it reaches."""
    names, rows = {"flop": "efficiency", "causal": "causal_efficiency"}, []
    for family, keeps in found["families"].items():
        for keep, one in keeps.items():
            before, after = one["unpruned"], one["reduced"]
            times = [ms(side["milliseconds"]["prefill"]) for side in (before, after)]
            tokens = f"{before['tokens']:.0f} -> {after['tokens']:.0f}"
            limits = [f"{one[f'{kind}_limit']:.2f}x: {one[names[kind]]:.2f}" for kind in names]
            rows.append([family, keep, tokens, *times, f"{one['speedup']['prefill']:.2f}x", *limits])
    for keep in found["pooled_efficiency"]:
        counted, causal = (found[f"pooled_{name}"][keep] for name in names.values())
        judged = target(causal, 0.9, f"**{causal:.2f}**, target ≥ 0.9")
        rows.append(["**pooled**", keep, "", "", "", "", f"**{counted:.2f}**", judged])
    columns = ["layout", "keep", "visual tokens", "ms", "pruned ms", "speed-up", "torch's count: efficiency"]
    return markdown([*columns, "FLOP limit: efficiency"], rows)


def every_reducer(found: dict) -> str:
    """A long prefill with each reducer; none may be slower than it is without."""
    rows = []
    for shape, one in found["shapes"].items():
        for name, measured in one["reducers"].items():
            if "refused" in measured:
                continue
            wall, cpu = measured["wall"], measured["cpu"]
            times = [f"{wall['unpruned']:.0f}", f"{wall['reduced']:.0f}", f"{measured['selection_ms']:.0f}"]
            speedups = [_wanted(wall["speedup"], 1.0), f"{cpu['speedup']:.2f}x"]
            rows.append([f"`{name}`", shape, str(one["visual_tokens"]), *times, *speedups])
    columns = ["reducer", "shape", "visual tokens", "ms", "reduced ms", "of it selection", "speed-up", "processor time"]
    return markdown(columns, rows, text_columns=2)


def encoder(found: dict) -> str:
    """What each statistic of the vision tower adds to its time, and the memory of a long picture."""
    rows = []
    for tower, one in found["towers"].items():
        times = one["times"]
        for what in (name for name in times if name != "nothing"):
            share = times[what]["share_of_full_depth"]
            extra = times[what]["median"] - times["nothing"]["median"]
            shown = [f"{extra:+.2f}", f"{100 * share:+.2f} %", target(share, 0.03, "≤ 3 %", at_most=True)]
            rows.append([tower, f"`{what}`", f"{one['blocks']} of {one['full_blocks']}", ms(times["nothing"]), *shown])
    columns = ["tower", "read", "blocks timed", "tower ms", "added ms", "share of all blocks", "target"]
    long = found["long"]
    memory = (
        f"Received attention of one picture of {long['patches']} patches holds {long['peak_bytes'] / MIB:.0f} MiB at "
        f"most; the N x N matrix of a single head would be {long['full_matrix_bytes'] / MIB:.0f} MiB."
    )
    return f"{markdown(columns, rows, text_columns=2)}\n{memory}"


def overhead(found: dict) -> str:
    """What the session adds where it changes nothing, and what decode steps behind a pruned prefill take."""
    rows = []
    for model, one in found.items():
        first, share = one["prefill"], one["prefill_share"]
        plain = ms(first["unwrapped"])
        verdict = bounded(share, one["targets"]["prefill_share"], "≤ 1 %")
        more = with_interval(share, 100, 2, "%")
        rows.append([model, "prefill, keep all", plain, ms(first["keep all"]), more, verdict])
        for name, added in one["decode_ms_added"].items():
            limit = one["targets"]["decode_ms"] if name == "keep all" else 0.0
            verdict = bounded(added, limit, f"≤ {limit:g} ms")
            times = [ms(one["decode"][side]) for side in ("unwrapped", name)]
            rows.append([model, f"decode step, {name}", *times, with_interval(added, 1, 3, "ms"), verdict])
    return markdown(["decoder", "", "unwrapped ms", "wrapped ms", "added", "target"], rows, text_columns=2)


def first_token(found: dict) -> str:
    """Time to first token with the vision tower, and where it goes."""
    timed, rows = found["first_token"], []
    for name, one in timed["profiles"].items():
        before, after = one["unpruned"]["milliseconds"], one["reduced"]["milliseconds"]
        speedup = one["speedup"]["first_token"]
        parts = [f"{before[phase]['median']:.0f} -> {after[phase]['median']:.0f}" for phase in ("vision", "prefill")]
        whole = f"{ms(before['first_token'])} -> {ms(after['first_token'])}"
        wanted = target(speedup, 2.2, "≥ 2.2x") if "tower" in name else ""
        right, chosen = f"{100 * found['accuracy'][name]['all']:.1f}", f"{after['selection']['median']:.1f}"
        rows.append([name, *parts, chosen, whole, f"{speedup:.2f}x", wanted, right])
    columns = ["", "tower ms", "prefill ms", "of it selection", "time to first token, ms", "speed-up", "target"]
    unpruned = 100 * found["accuracy"]["unpruned"]["all"]
    table = markdown([*columns, "accuracy of mini-llava, %"], rows)
    return f"{table}\n`{timed['shape']}`; `mini-llava` unpruned: {unpruned:.1f} % of {found['questions']} questions."


def batches(found: dict) -> str:
    """Latency and throughput by batch size."""
    rows, ratios = [], []
    for batch, one in found["batches"].items():
        latency = [ms(one[side]["milliseconds"]["end_to_end"]) for side in ("unpruned", "reduced")]
        rate, gain = (
            f"{pair['unpruned']:.3g} -> {pair['reduced']:.3g}"
            for pair in (one["samples_per_second"], one["batch_gain"])
        )
        first, decode = (f"{one['speedup'][phase]:.2f}x" for phase in ("first_token", "decode"))
        rows.append([batch, " -> ".join(latency), rate, gain, first, decode])
        if one["batch"] > 1:
            ratios.append(one["batch_gain"]["reduced"] / one["batch_gain"]["unpruned"])
    columns = ["batch", "whole answer, ms", "answers a second", "gain over batch 1", "first token", "decode step"]
    mean = geometric_mean(ratios)
    verdict = target(mean, 1.0, f"gain of the pruned over that of the unpruned {mean:.2f}, target ≥ 1")
    return f"{markdown(columns, rows)}\n{found['reducer']}, {found['new_tokens']} new tokens; {verdict}."


def memory(found: dict) -> str:
    """Bytes of the cache and of what the decoder holds."""
    rows, whole = [], found["unpruned"]
    for name, one in found.items():
        kv, peak = (one[key] / whole[key] for key in ("kv_bytes", "peak_bytes"))
        columns = one["columns"]
        per_layer = ", ".join(f"{columns.count(n)} x {n}" for n in dict.fromkeys(columns))
        sizes = [f"{one[key] / MIB:.1f}" for key in ("kv_bytes", "peak_bytes")]
        share = sum(columns) / sum(whole["columns"])
        rows.append([name, per_layer, f"{share:.3f}", sizes[0], f"{kv:.3f}", sizes[1], f"{peak:.3f}"])
    names = ["", "layers x stored columns", "share", "KV MiB", "share", "decoder's peak MiB", "share"]
    return markdown(names, rows, text_columns=2)


def gpu(found: dict) -> str:
    """The targets on a GPU; what failed there is named."""
    rows, parts = [], found["parts"]
    for name, one in parts.get("selection", {}).items():
        if isinstance(one, dict):
            median = one["vtoken"]["median"]
            shown = f"{ms(one['baseline'])} -> {ms(one['vtoken'])} ms"
            rows.append([f"selection, {name}", shown, target(median, 1.0, "≤ 1 ms", at_most=True)])
    for kind in ("efficiency", "causal_efficiency"):
        for keep, value in found[f"pooled_{kind}"].items():
            name = f"prefill, {kind.replace('_', ' ')}, keep {keep}, pooled"
            rows.append([name, f"{value:.2f}", target(value, 0.8, "≥ 0.8")])
    for name, profiles in parts.items():
        if name.startswith("prefill "):
            rows += _gpu_prefills(name.removeprefix("prefill "), profiles)
        if name.startswith("session "):
            rows.append(_gpu_session(one=profiles))
        if name.startswith("encoder "):
            worst = max(one.get("share_of_full_depth", 0.0) for one in profiles["times"].values())
            verdict = target(worst, 0.03, "≤ 3 %", at_most=True)
            rows.append([f"encoder scores, {name.removeprefix('encoder ')}, dearest", f"{100 * worst:+.2f} %", verdict])
    rows += [[name, f"failed: {reason}", ""] for name, reason in found["failed"].items()]
    return markdown(["", "measured", "target"], rows)


def _gpu_prefills(shape: str, profiles: dict) -> list[list[str]]:
    rows = []
    for reducer, one in profiles.items():
        speedup = one["speedup"]["first_token"]
        shown = f"{one['speedup']['prefill']:.2f}x of {one['flop_limit']:.2f}x; first token {speedup:.2f}x"
        chained = reducer.startswith("chain") and shape == "llava-next-7b"
        rows.append([f"prefill, {shape}, {reducer}", shown, target(speedup, 2.65, "≥ 2.65x") if chained else ""])
    return rows


def _gpu_session(one: dict) -> list[str]:
    share, step = one["prefill_share"], one["decode_ms_added"]["keep all"]
    first = bounded(share, one["targets"]["prefill_share"], "≤ 1 %")
    later = bounded(step, one["targets"]["decode_ms"], "≤ 0.1 ms")
    shown = f"prefill {with_interval(share, 100, 2, '%')}, decode step {with_interval(step, 1, 3, 'ms')}"
    return ["session at keep=1.0", shown, f"{first}, {later}"]


def made_with(found: Mapping[str, Any]) -> str:
    """Hardware and versions."""
    machine = found.get("gpu") or f"{found['threads']} thread{'s' * (found['threads'] > 1)} of {found['cpu']}"
    return f"{machine}; torch {found['torch']}, transformers {found['transformers']}."


TABLES: dict[str, tuple[str, Callable[[dict], str]]] = {
    "selection": ("selection", selection),
    "prefill": ("prefill_efficiency", prefill),
    "every_reducer": ("prefill_all", every_reducer),
    "encoder": ("encoder_scores", encoder),
    "overhead": ("overhead", overhead),
    "first_token": ("tower_prune", first_token),
    "batches": ("end_to_end", batches),
    "memory": ("memory", memory),
    "gpu": ("gpu_all", gpu),
}
"""Block -> the benchmark that writes its numbers, and what renders them."""


def speed(name: str, results: Path) -> str:
    """The text of one block."""
    benchmark, render = TABLES[name]
    path = results / f"{benchmark}.json"
    if not path.is_file():
        where = " on a GPU" if name == "gpu" else ""
        return f"\nNot measured{where} yet: `python benchmarks/{benchmark}.py` does it.\n"
    data = json.loads(path.read_text(encoding="utf-8"))
    return f"\n{render(data['results']).rstrip()}\n\n{made_with(data['surroundings'])}\n"
