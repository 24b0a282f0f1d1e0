# SPDX-License-Identifier: Apache-2.0
"""``vtoken doctor``: does vtoken work on this model, on this machine, with these versions?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from vtoken.cli.console import INTERRUPTED, err, out, sentences

if TYPE_CHECKING:
    from rich.console import Console

    from vtoken.doctor.examine import Examination
    from vtoken.doctor.report import Report

STYLES = {"passed": "green", "failed": "bold red", "refused": "yellow", "unproven": "yellow", "skipped": "dim"}


def doctor_command(
    model: Annotated[
        str, typer.Argument(help="Embedded model, folder or hub id; with --random-weights a shape or configuration.")
    ] = "mini-llava",
    reducers: Annotated[
        list[str] | None, typer.Option("-r", "--reducer", help="Name, preset or YAML file; all by default.")
    ] = None,
    keeps: Annotated[list[str] | None, typer.Option("-k", "--keep", help="Ratio, or tokens per image.")] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="From a configuration alone, cut in depth to fit the memory.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...; the accelerator if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    attn: Annotated[str | None, typer.Option(help="Attention backend: sdpa, eager, flash_attention_2 ...")] = None,
    tokens: Annotated[int, typer.Option(help="Visual tokens of a prompt, with --random-weights.", min=1)] = 576,
    measure: Annotated[bool, typer.Option(help="Whether times and memory are measured, too.")] = True,
    file: Annotated[
        Path | None, typer.Option("--json", help="Where the report goes; no picture and no prompt is in it.")
    ] = None,
) -> None:
    """Find out on the model itself whether vtoken works on it: exit code 0 yes, 1 a fault, 2 it could not be run."""
    progress = err()
    with sentences():
        import yaml

        from vtoken.doctor.examine import Examination
        from vtoken.doctor.loading import load

        found = load(model, random_weights=random_weights, device=device, dtype=dtype, attn=attn)
        parsed = [yaml.safe_load(keep) for keep in keeps or ["0.25"]]
        examination = Examination(found.model, None, found.processor, reducers, parsed, tokens)
    report = examination.report
    report.model, report.note = Path(model).name if Path(model).exists() else model, found.note
    code = _run(examination, measure, progress)
    if file is not None:
        with sentences():
            file.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
        progress.print(f"Written to {file}", highlight=False)
    if report.checks:
        _show(report, out())
    raise typer.Exit(code)


def _run(examination: Examination, measure: bool, progress: Console) -> int:
    """Run it with its progress on stderr; whatever ends it, what is known so far stays in the report."""
    report = examination.report

    def listen(line: str) -> None:
        progress.print(escape(line), style="dim", highlight=False, soft_wrap=True)

    try:
        examination.run(measure=measure, seconds=60.0, listen=listen)
    except KeyboardInterrupt:
        report.verdict = "The examination was interrupted: what is shown had been done before."
        return INTERRUPTED
    except ValueError as error:
        report.verdict = str(error)
        progress.print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    return report.exit_code


def _show(report: Report, console: Console) -> None:
    if report.found is not None:
        console.print(_found(report))
    console.print(_rows("check", [(check.name, check.status, check.detail) for check in report.checks]))
    if report.reducers:
        console.print(_rows("reducer", [(row.reducer, row.status, row.detail) for row in report.reducers]))
    style = {0: "bold green", 1: "bold red"}.get(report.exit_code, "bold yellow")
    console.print(escape(report.verdict), style=style, highlight=False, soft_wrap=True)


def _rows(what: str, rows: list[tuple[str, str, str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in (what, "", "what was seen"):
        table.add_column(column, overflow="fold")
    for name, status, detail in rows:
        table.add_row(escape(name), f"[{STYLES[status]}]{status}[/]", escape(detail))
    return table


def _found(report: Report) -> Table:
    """Model, modules and prompts."""
    found, prompt, noise = report.found, report.prompt, report.noise
    assert found is not None, "only shown where something was found"
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_header=False, title=escape(report.model), title_justify="left"
    )
    table.add_column()
    table.add_column(overflow="fold")
    kinds = ", ".join(f"{count} {kind}" for kind, count in found.layer_kinds.items())
    windows = "unknown" if found.global_blocks is None else _numbers(found.global_blocks, found.tower_blocks)
    rows = {
        "model": f"{found.model_class} ({found.model_type}), {found.parameters / 1e9:.3g} billion parameters",
        "note": report.note,
        "runs as": f"{found.dtype} on {found.device}, {found.attention} attention, {_versions(report)}",
        "adapter": found.adapter,
        "merges pictures": found.outer or "in code of its own",
        "language model": f"{found.language_model}, {found.layers} layers: {kinds}",
        "vision tower": f"{found.tower or 'unknown'}, blocks that see the whole picture: {windows}",
        "projector": found.projector or "none of its own",
        "placeholders": ", ".join(f"{name} {token}" for name, token in found.placeholders.items() if token is not None),
    }
    if prompt is not None:
        rows["prompts"] = f"{prompt.source}: {prompt.visual_tokens} visual and {prompt.text_tokens} text tokens"
    if noise is not None:
        rows["noise"] = (
            f"logits up to {noise.scale:.3g}; unwrapped, they differ by {noise.repeated:.2g} when repeated, "
            f"{noise.order:.2g} in the other order, {noise.padded:.2g} when padded; {noise.tolerance:.2g} is no fault"
        )
    for name, text in rows.items():
        if text:
            table.add_row(name, escape(text))
    return table


def _numbers(blocks: list[int], count: int | None) -> str:
    return f"all {count}" if len(blocks) == count else f"{', '.join(map(str, blocks)) or 'none'} of {count}"


def _versions(report: Report) -> str:
    names = ("vtoken", "torch", "transformers")
    return ", ".join(f"{name} {report.surroundings.get(name, 'unknown')}" for name in names)
