# SPDX-License-Identifier: Apache-2.0
"""``vtoken profile``: what a reducer costs and saves on this machine, and where the time goes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from vtoken.cli.console import bar, err, out, sentences

if TYPE_CHECKING:
    from vtoken.profile.spread import Ratio
    from vtoken.reducers.base import Reducer

ROWS = {
    "vision": "vision tower",
    "projector": "projector",
    "packing": "packing of crops or frames",
    "selection": "selection",
    "prefill": "prefill, selection included",
    "first_token": "time to first token",
    "decode": "decoding, per token",
    "end_to_end": "end to end",
}
FORMAT = "vtoken-profile-3"


def profile_command(
    model: Annotated[
        str, typer.Option("-m", "--model", help="Embedded model, folder or hub id; with --random-weights also a shape.")
    ] = "mini-llava",
    reducer: Annotated[str, typer.Option("-r", "--reducer", help="Name, preset or YAML file.")] = "idpruner",
    keep: Annotated[str, typer.Option("-k", "--keep", help="Ratio, or tokens per image.")] = "0.25",
    batch: Annotated[int, typer.Option(help="Prompts at once.", min=1)] = 1,
    tokens: Annotated[int, typer.Option(help="Visual tokens a prompt; the nearest possible number.", min=1)] = 576,
    new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.", min=2)] = 8,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    attn: Annotated[
        str | None, typer.Option(help="Attention backend of the pruned model; the baseline has the fastest.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...; the accelerator if there is one.")] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="From a configuration alone, without a checkpoint.")
    ] = False,
    rounds: Annotated[int, typer.Option(help="Runs of each kind that count.", min=1)] = 5,
    file: Annotated[Path, typer.Option("--out", help="Where the JSON goes.")] = Path("vtoken-profile.json"),
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option("--compare", help="Show two such JSON files side by side instead.")
    ] = None,
) -> None:
    """Time, memory and FLOPs of a reducer next to the unpruned model."""
    if compare is not None:
        with sentences():
            both = [_read(path) for path in compare]
        out().print(_table(both, [path.stem for path in compare]))
        return
    with sentences():
        import yaml

        from vtoken.registry import get_reducer

        chosen = get_reducer(reducer, keep=yaml.safe_load(keep))
        built = _random(model, dtype, device) if random_weights else _loaded(model, dtype, device)
    report = {
        "format": FORMAT,
        "model": model,
        "reducer": str(chosen),
        **_measure(built, chosen, batch, tokens, new_tokens, rounds, attn),
    }
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    out().print(_table([report], [str(chosen)]))
    err().print(f"Written to {file}", highlight=False)


def _random(name: str, dtype: str, device: str | None) -> Any:
    import torch

    from vtoken.profile.shapes import random_model, shape_config

    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = ("bfloat16" if target.startswith("cuda") else "float32") if dtype == "auto" else dtype
    if not isinstance(getattr(torch, chosen, None), torch.dtype):
        raise ValueError(f"Unknown dtype {dtype!r}: choose one of auto, float32, bfloat16, float16.")
    return random_model(shape_config(name), device=target, dtype=getattr(torch, chosen))


def _loaded(name: str, dtype: str, device: str | None) -> Any:
    from vtoken.eval.model.loading import ModelSpec, load_model

    return load_model(ModelSpec(name, dtype=dtype, device=device))[0]


def _measure(
    model: Any, reducer: Reducer, batch: int, tokens: int, new_tokens: int, rounds: int, attn: str | None
) -> dict[str, Any]:
    from vtoken.adapters.synthetic import synthetic_inputs
    from vtoken.eval.provenance import surroundings
    from vtoken.profile import profile
    from vtoken.profile.breakeven import Point, break_even
    from vtoken.profile.measure import count_steps

    points, counts = [], sorted({max(tokens // 4, 1), max(tokens // 2, 1), tokens})
    with bar() as progress:
        task = progress.add_task("measuring", total=sum(counts) * count_steps(model, rounds))  # time grows with tokens
        for count in counts:
            inputs = synthetic_inputs(model, batch, count)
            found = profile(
                model,
                reducer,
                inputs,
                new_tokens=new_tokens,
                rounds=rounds,
                attention=attn,
                step=functools.partial(progress.advance, task, count),
            )
            before, after = (side.milliseconds["prefill"].median for side in (found.unpruned, found.reduced))
            selection = found.reduced.milliseconds["selection"].median
            points.append(Point(round(found.unpruned.tokens), before, after, selection))
    weight = next(model.parameters())
    several = len({point.tokens for point in points}) > 1
    return {
        **found.as_dict(),
        "break_even": break_even(points) if several else None,
        "break_even_points": [point._asdict() for point in points] if several else [],
        "model_type": model.config.model_type,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": str(weight.device),
        "surroundings": surroundings(),
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON file: {error}.") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path} is not what vtoken profile writes: make one with vtoken profile --out {path}.")
    return found


def _table(reports: list[dict[str, Any]], titles: list[str]) -> Table:
    """Unpruned and reduced, one pair of columns a report."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=_caption(reports))
    table.add_column("ms, median ± half the interquartile range")
    for title in titles:
        for column in ("unpruned", title, "speed-up"):
            table.add_column(column, justify="right")
    for phase, label in ROWS.items():
        table.add_row(label, *(cell for report in reports for cell in _times(report, phase)))
    for label, key, text in (
        ("visual tokens to the decoder", "tokens", lambda value: f"{value:.0f}"),
        ("peak memory of a prefill", "peak_bytes", _bytes),
        ("KV cache after it", "kv_bytes", _bytes),
        ("FLOPs of the prefill", "prefill_flops", lambda value: f"{value / 1e9:,.1f} G"),
    ):
        cells = []
        for report in reports:
            plain, reduced = report["unpruned"][key], report["reduced"][key]
            cells += [text(plain), text(reduced), f"{plain / max(reduced, 1e-9):.2f}x"]
        table.add_row(label, *cells)
    for label, text in (
        ("prefill speed-up / FLOP ratio", _efficiency),
        ("break-even, visual tokens", _break_even),
        ("answers per second", lambda report: f"{report['samples_per_second']['reduced']:.3g}"),
    ):
        table.add_row(label, *(cell for report in reports for cell in ("", text(report), "")))
    return table


def _times(report: dict[str, Any], phase: str) -> tuple[str, str, str]:
    plain, reduced = (report[side]["milliseconds"][phase] for side in ("unpruned", "reduced"))
    ratio = _ratio(report, phase)
    cells = [f"{x['median']:.4g} ± {x['iqr'] / 2:.2g}" for x in (plain, reduced)]
    return (cells[0] if ratio else "", cells[1], str(ratio or ""))


def _ratio(report: dict[str, Any], phase: str) -> Ratio | None:
    """None for the selection, which the unpruned model has not."""
    from vtoken.profile.spread import Ratio

    return Ratio(**report["ratios"][phase]) if phase in report["ratios"] else None


def _efficiency(report: dict[str, Any]) -> str:
    prefill = _ratio(report, "prefill")
    return "noisy" if prefill and prefill.noisy else f"{report['efficiency']:.2f}"


def _bytes(value: float) -> str:
    return f"{value / 2**20:,.1f} MiB"


def _break_even(report: dict[str, Any]) -> str:
    if report["break_even"] is not None:
        return f"{report['break_even']:.0f}"
    measured = [point["tokens"] for point in report["break_even_points"]]
    return (
        f"none: selecting costs more than it saves at {', '.join(map(str, measured))}" if measured else "one size only"
    )


def _caption(reports: list[dict[str, Any]]) -> str:
    lines = []
    for report in reports:
        fastest = min(report["attention"], key=report["attention"].get)
        lines.append(
            f"{report['model']}, {report['dtype']} on {report['device']}, batch {report['batch']}, "
            f"{report['new_tokens']} new tokens, {report['rounds']} alternating rounds, baseline attention {fastest}, "
            f"torch {report['surroundings']['torch']}"
        )
    return "\n".join(dict.fromkeys(lines))
