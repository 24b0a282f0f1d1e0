# SPDX-License-Identifier: Apache-2.0
"""What ``vtoken train-gate`` and ``vtoken train-scorer`` share: options, loading, progress, how to go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from vtoken.cli.console import INTERRUPTED, bar, err, out, sentences

Model = Annotated[str, typer.Option("-m", "--model", help="Embedded model, folder or hub id; it stays frozen.")]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="JSON lines with image, prompt and answer; embedded models bring their own questions."),
]
Out = Annotated[Path, typer.Option("--out", help="The checkpoint, a .safetensors file.")]
Steps = Annotated[int, typer.Option(help="Updates.")]
BatchSize = Annotated[int, typer.Option(help="Examples an update.")]
Rate = Annotated[float, typer.Option("--lr", help="Learning rate at the beginning; it falls to 0.")]
Seed = Annotated[int, typer.Option(help="Of initial weights, examples and random choices.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over instead of going on.")]


def train_part(
    train: Callable[..., list[float]],
    use: str,
    model: str,
    data: Path | None,
    path: Path,
    fresh: bool,
    **numbers: Any,
) -> None:
    """Load the model and its examples, train with progress, and say how the result is used.

    Parameters
    ----------
    train : callable
        ``train(model, processor, source, path, plan=..., about=..., report=...)``.
    use : str
        The reducer's parameters that name the checkpoint, with ``{}`` for its path.
    model, data, path, fresh
        As on the command line.
    **numbers
        Of the `Plan`.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    with sentences():
        from vtoken.training.loop import Plan, discard

        plan = Plan(**numbers)
        vlm, processor, source = _load(model, data, plan.seed)
        if fresh:
            discard(path)
    with bar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bars:
        task = bars.add_task("training", total=plan.steps)

        def report(step: int, numbers: dict[str, float]) -> None:
            shown = ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())
            bars.update(task, completed=step, description=shown)
            if bars.disable and (step % 10 == 0 or step == plan.steps):
                err().print(f"step {step} of {plan.steps}: {shown}", highlight=False, soft_wrap=True)

        try:
            with sentences():
                train(vlm, processor, source, path, plan=plan, about={"model": model}, report=report)
        except KeyboardInterrupt:
            err().print("Stopped. The same command goes on from the last saved step.")
            raise typer.Exit(INTERRUPTED) from None
    out().print(
        f"Written: {path}; use it with {use.format(repr(str(path)))}", highlight=False, markup=False, soft_wrap=True
    )


def _load(model: str, data: Path | None, seed: int) -> tuple[Any, Any, Any]:
    """Model, processor and source of examples.

    Raises
    ------
    ValueError
        If one of them cannot be had, or they do not go together.
    """
    from transformers.utils.logging import disable_progress_bar

    from vtoken.eval.model.loading import ModelSpec, load_model
    from vtoken.training import JsonlSource, MiniSource

    spec = ModelSpec(model)
    if data is None and spec.kind != "embedded":
        raise ValueError(
            f"Training on {model!r} needs examples: give --data, JSON lines with image, prompt and answer."
        )
    source = MiniSource(seed) if data is None else JsonlSource(data, seed)
    disable_progress_bar()  # of transformers: it would tear ours
    return *load_model(spec), source
