# SPDX-License-Identifier: Apache-2.0
"""``vtoken show``: pictures of what reducers keep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vtoken.cli.console import bar, err, items, out, sentences

MODEL = "mini-llava"


def show_command(
    pictures: Annotated[
        list[Path] | None, typer.Argument(help="Images or clips; without any a bundled one.", show_default=False)
    ] = None,
    question: Annotated[str | None, typer.Option("-q", "--question", help="Also show the answers to it.")] = None,
    model: Annotated[str, typer.Option("-m", "--model", help="Embedded model, folder or hub id.")] = MODEL,
    reducer: Annotated[
        str, typer.Option("-r", "--reducer", help="Names, presets or YAML files, with commas.")
    ] = "idpruner,todre,fastv",
    keep: Annotated[str, typer.Option("-k", "--keep", help="Ratios, or tokens per image, with commas.")] = "0.25,0.1",
    file: Annotated[Path, typer.Option("--out", help="A .png, .jpg or .html file.")] = Path("kept.png"),
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer.", min=1)] = 64,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...; the accelerator if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Look at what reducers keep of pictures: bright kept, dim dropped inside of the decoder, dark never let in."""
    with sentences():
        from vtoken.eval.show import visuals
        from vtoken.eval.show.sheet import captions, check_name, save

        check_name(file)
        reducers, keeps = [str(one) for one in items(reducer) or []], items(keep) or []
        if not reducers or not keeps:
            raise ValueError("Nothing to show: give at least one reducer and one keep ratio.")
        shown: list[Any] = [visuals.read(path) for path in pictures or []]
        if not shown:
            picture, about = visuals.bundled()
            shown, question = [picture], question or about
        found = _run(model, dtype, device, shown, question, reducers, keeps, max_new_tokens)
        save(found, file)
    if found.question is not None:
        out().print(f"unpruned: “{found.answer}”", highlight=False, markup=False)
    for title, cells in found.rows:
        for ratio, cell in zip(found.keeps, cells, strict=True):
            out().print(f"{title}, keep {ratio}: {', '.join(captions(cell))}", highlight=False, markup=False)
    err().print(f"Written to {file}", highlight=False)


def _run(
    name: str,
    dtype: str,
    device: str | None,
    shown: list[Any],
    question: str | None,
    reducers: list[str],
    keeps: list[Any],
    max_new_tokens: int,
) -> Any:
    from vtoken.eval.model.loading import ModelSpec, load_model
    from vtoken.eval.show.gallery import Prompt, gallery

    model, processor = load_model(ModelSpec(name, dtype=dtype, device=device))
    prompt = Prompt(model, processor, shown, question, max_new_tokens)
    with bar() as progress:
        task = progress.add_task("reducers", total=len(reducers) * len(keeps))
        return gallery(prompt, name, question, reducers, keeps, lambda: progress.advance(task))
