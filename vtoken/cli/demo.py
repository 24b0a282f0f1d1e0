# SPDX-License-Identifier: Apache-2.0
"""``vtoken demo``: a page on which a model answers with and without a reducer."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from vtoken.cli.console import err, sentences

MODEL, HOST, PORT = "mini-llava", "127.0.0.1", 7860


def demo_command(
    model: Annotated[str, typer.Option("-m", "--model", help="Embedded model, folder or hub id.")] = MODEL,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = HOST,
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = PORT,
    share: Annotated[
        bool, typer.Option("--share", help="Also a public link for a week, through a server of Gradio's makers.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer.", min=1)] = 64,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...; the accelerator if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Ask a model about pictures in the browser, unpruned and pruned side by side; Ctrl-C ends it."""
    with sentences():
        from vtoken.eval.demo.serving import check, serving

        check(host, port)  # before the model, which may take minutes
        from vtoken.eval.demo.asking import Asking
        from vtoken.eval.model.loading import ModelSpec, load_model

        found = load_model(ModelSpec(model, dtype=dtype, device=device))
        with serving(Asking(model, *found, max_new_tokens), host, port, share=share) as addresses:
            for address in addresses:
                err().print(f"{model} answers at {address}", highlight=False, soft_wrap=True)
            until_interrupted()


def until_interrupted() -> None:
    """Wait for Ctrl-C, with which a server ends as it should."""
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        err().print("Stopped.")
