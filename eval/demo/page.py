# SPDX-License-Identifier: Apache-2.0
"""The demo's page: what is on it, and what happens where. It knows Gradio, and of models only `Asking`."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from vtoken.eval.demo.asking import Asking, Compared, examples, summary
from vtoken.eval.show.sheet import LEGEND, captions
from vtoken.eval.show.visuals import read_picture
from vtoken.registry import list_reducers

REDUCER, KEEP = "idpruner", 0.25
FONT = gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700))  # comes with Gradio: no page fetches it from elsewhere
THEME = gr.themes.Soft(primary_hue="teal", font=[FONT, gr.themes.Font("sans-serif")])
COLOURS = {"kept": "#0d9488", "left out": "#cbd5e1"}
DAY = 86400  # seconds after which uploaded pictures are deleted, if the server does not end before
INTRO = """# What does {name} need to see?
The model answers twice: with all visual tokens of the picture, and with those that a reducer keeps."""


def build(asking: Asking, folder: Path) -> gr.Blocks:
    """The page of a model; pictures of the examples are written to ``folder``."""
    offered = examples(folder)
    (first, about), *_ = offered
    title = f"vtoken demo: {asking.name}"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(DAY, DAY)) as page:
        gr.Markdown(INTRO.format(name=asking.name))
        with gr.Row():
            with gr.Column(scale=2):
                picture = gr.Image(first, label="Picture", sources=["upload", "clipboard"], height=220, buttons=[])
                question = gr.Textbox(about, label="Question")
                found = gr.Examples([list(pair) for pair in offered], [picture, question], visible_columns=[0])
                reducer = gr.Dropdown(list_reducers(), value=REDUCER, label="Reducer", info=summary(REDUCER))
                keep = gr.Slider(0.02, 1, KEEP, step=0.01, label="Keep", info="Share of the visual tokens.")
                button = gr.Button("Ask", variant="primary")
            with gr.Column(scale=3):
                with gr.Row():
                    unpruned = gr.Textbox(label="Unpruned", interactive=False, lines=2)
                    pruned = gr.Textbox(label="Pruned", interactive=False, lines=2)
                with gr.Row():
                    kept = gr.Image(show_label=False, interactive=False, height=400, buttons=["fullscreen"])
                    layers = gr.BarPlot(
                        x="layer",
                        y="visual tokens",
                        color="tokens",
                        color_map=COLOURS,
                        title="Visual tokens by decoder layer",
                        height=400,
                    )
                told = gr.Markdown(LEGEND)
                gr.Markdown("Times are of one run each on this machine; `vtoken profile` measures them.")
        _connect(asking, [picture, question, reducer, keep], [unpruned, pruned, kept, layers, told], button, found)
    return page


def _connect(asking: Asking, given: list[Any], shown: list[Any], button: gr.Button, found: Any) -> None:
    """What makes the model answer: one question at a time, whoever asks; the others queue."""
    _, question, reducer, keep = given
    # Gradio reads a picture before it calls: a broken one would be its error, with a traceback
    how: dict[str, Any] = {"preprocess": False, "concurrency_id": "model", "concurrency_limit": 1}
    how["show_progress_on"] = shown[:2]

    def answer(picture: dict[str, Any] | None, question: str, reducer: str, keep: float) -> list[Any]:
        try:
            return outcome(asking.compare(_uploaded(picture), question, reducer, keep))
        except ValueError as error:
            raise gr.Error(_plain(error), print_exception=False) from error

    gr.on([button.click, question.submit], answer, given, shown, api_name="ask", **how)
    how["api_visibility"] = "private"
    gr.on([keep.release, reducer.input], answer, given, shown, trigger_mode="always_last", **how)
    found.load_input_event.then(answer, given, shown, **how)
    reducer.input(
        lambda name: gr.Dropdown(info=summary(name)),
        reducer,
        reducer,
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )


def _uploaded(picture: dict[str, Any] | None) -> Any:
    """The picture (PIL, RGB) of what Gradio knows of it: where it put it, and what the user called it."""
    if picture is None or not picture["path"]:
        return None
    return read_picture(Path(picture["path"]), picture["orig_name"] or "The picture")


def _plain(text: object) -> str:
    return html.escape(str(text), quote=False)  # Gradio's messages are HTML


def outcome(found: Compared) -> list[Any]:
    """What is shown of two answers: two texts, a picture, a plot and a line about both."""
    before, after = found.unpruned, found.pruned
    unpruned = gr.Textbox(before.text, info=_times(before.first, before.whole))
    if after.picture is None:
        gr.Warning(_plain(after.why))
        return [unpruned, gr.Textbox("", info=""), None, None, LEGEND]
    pruned = gr.Textbox(after.answer, info=_times(after.first, after.whole))
    tokens, selection, *_ = captions(after)
    told = f"**{tokens}**, {selection}. {LEGEND.capitalize()}."
    return [unpruned, pruned, after.picture, by_layer(after.tokens, after.layers), told]


def _times(first: float, whole: float) -> str:
    return f"{first:.0f} ms to the first token, {whole:.0f} ms in all"


def by_layer(tokens: int, layers: tuple[int, ...]) -> pd.DataFrame:
    """What the plot shows: for each decoder layer how many of the visual tokens are in it, and how many are not."""
    rows = [(str(n), count, what) for n, kept in enumerate(layers) for what, count in _split(tokens, kept)]
    return pd.DataFrame(rows, columns=["layer", "visual tokens", "tokens"])


def _split(tokens: int, kept: int) -> list[tuple[str, int]]:
    return [("left out", tokens - kept), ("kept", kept)]  # as they are stacked, from the top
