# SPDX-License-Identifier: Apache-2.0
"""The training runs from its start to a loadable model; its packing is what a lone prompt looks like."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from vtoken.mini.loader import check
from vtoken.mini.models import ARCHITECTURES
from vtoken.mini.questions import KINDS
from vtoken.mini.training.__main__ import main
from vtoken.mini.training.answering import answer
from vtoken.mini.training.batches import SCENE_ASKS, ask, pack, train_rng
from vtoken.mini.training.feed import ASKS, Feed
from vtoken.mini.training.labels import IGNORE
from vtoken.mini.training.supervision import PLACE_FIELDS, Heads, Symbols
from vtoken.mini.training.tower import encode, view_labels
from vtoken.mini.videos import STEP
from vtoken.mini.world import CELLS, sample_scene


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_phases_and_export(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["training", name, "--out", str(tmp_path), "--steps", "1"])
    main()
    check(tmp_path / "export")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "export")
    assert type(model) is type(ARCHITECTURES[name].build_model(0))
    AutoProcessor.from_pretrained(tmp_path / "export")
    times = json.loads((tmp_path / "times.json").read_text())
    assert list(times) == list(ARCHITECTURES[name].steps)
    assert all(set(phase) == {"clock", "processor"} for phase in times.values())


def test_unknown_phase(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["training", "mini-internvl", "--out", str(tmp_path), "--phase", "align"])
    with pytest.raises(SystemExit):
        main()
    assert "unknown phase align: mini-internvl has decoder, tower, joint" in capsys.readouterr().err


def alone(architecture, model, question, images, video):
    """Logits of one question in the stock model, with inputs of the stock processor."""
    processor = architecture.build_processor()
    content = [{"type": "video"}] if video else [{"type": "image"}] * len(images)
    content = [*content, {"type": "text", "text": question.text}]
    chat = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    shown = {"images": [Image.fromarray(image) for image in images]}
    if video:
        shown = {"videos": [np.stack(images)], "do_sample_frames": False}
    inputs = processor(text=text, return_tensors="pt", add_special_tokens=False, **shown)
    return model(**inputs).logits[0, -1]


CASES = [("mini-llava", "scene"), ("mini-llava-next", "scene"), ("mini-llava-next", "multi"), ("mini-internvl", "read")]
CASES += [("mini-internvl", "multi"), ("mini-qwen2.5-vl", "scene"), ("mini-qwen2.5-vl", "multi")]
CASES += [("mini-qwen2.5-vl", "video"), ("mini-qwen2.5-vl", "describe")]


@pytest.mark.parametrize(("name", "task"), CASES)
def test_packed_answers_equal_a_lone_prompt(name, task):
    """The first answer token of a packed question has the logits that the stock model and processor give it."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = architecture.build_model(0).eval()
    heads = Heads(PLACE_FIELDS if architecture.positions_unseen else (), architecture.tower_width)
    feed = Feed(architecture, model, train_rng(11))
    if architecture.tasks:
        shown = feed.draw({task: 1.0})
        documents = shown.batch.scenes[:2]
        shown = feed.show(task, documents, tuple(n // 42 for n in (documents[0][0].width, documents[0][0].height)))
    else:
        shown = feed.show(task, [[sample_scene(feed.rng)] for _ in range(2)], (CELLS, CELLS))
    asked = [ask(scenes, 3, ASKS[task], feed.rng) for scenes in shown.batch.scenes]
    packed = pack(asked, shown.batch.places, STEP if task == "video" else 1)
    painted = shown.batch.paint(np.random.default_rng(5))
    shown.batch.paint = lambda rng: painted
    with torch.no_grad():
        visual = encode(model, feed.pixels(shown), 2)
        found = answer(model, heads, visual, shown.prompt, packed, shown.batch.labels)
        first = [(packed.block[:1, 1:] == n + 1) & (packed.labels[:1, 1:] != -100) for n in range(3)]
        starts = [int(torch.cat([f, torch.zeros_like(f)]).flatten().nonzero()[0]) for f in first]
        counted = (packed.labels[0, 1:] != -100).cumsum(0) - 1
        for question, start in zip(asked[0], starts, strict=True):
            wanted = alone(architecture, model, question, painted[0], task == "video")
            torch.testing.assert_close(found.logits[counted[start]], wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_regions_show_what_a_question_names(kind):
    """The tokens a noun points at carry the labels of the thing that it names."""
    architecture = ARCHITECTURES["mini-llava-next"]
    feed = Feed(architecture, architecture.build_model(0), train_rng(12))
    shown = feed.draw({"scene": 1.0})
    asked = [ask(scenes, 2, [SCENE_ASKS[kind]], feed.rng) for scenes in shown.batch.scenes]
    packed = pack(asked, shown.batch.places)
    labels = shown.batch.labels
    for document, columns in enumerate(packed.nouns):
        for noun in (columns >= 0).nonzero()[:, 0]:
            region = packed.regions[document, noun]
            assert len(labels["shape"][document][region].unique()) <= 2  # of a neighbour, at most
            center = packed.centers[document, noun]
            assert region[center]
            assert not shown.batch.places.part[center]


def test_view_labels_find_each_thing_in_the_thumbnail_and_in_its_crops():
    architecture = ARCHITECTURES["mini-llava-next"]
    feed = Feed(architecture, architecture.build_model(0), train_rng(13))
    shown = feed.show("scene", [[sample_scene(feed.rng, word_step=2)]], (CELLS, CELLS))
    found = view_labels(shown.batch)
    assert found.shape[0] == 5
    shapes = shown.batch.scenes[0][0].of("shape")
    assert found[0, :36].sum() == len(shapes)
    assert (found[1:, :36].amax(0) == found[0, :36]).all()


def test_symbols_are_recovered_from_features_that_they_made():
    torch.manual_seed(0)
    made, fitted = Symbols(), Symbols()
    architecture = ARCHITECTURES["mini-llava"]
    feed = Feed(architecture, architecture.build_model(0), train_rng(14))
    shown = feed.show("scene", [[sample_scene(feed.rng, crowded=True)] for _ in range(40)], (CELLS, CELLS))
    flat = {name: values.flatten() for name, values in shown.batch.labels.items()}
    sure = flat["kind"] != IGNORE
    flat = {name: values[sure] for name, values in flat.items()}
    with torch.no_grad():
        features = made(flat)
        fitted.start_from_features(flat, features)
        torch.testing.assert_close(fitted(flat), features, atol=2e-2, rtol=0)


def test_symbols_start_from_the_words_they_name():
    architecture, symbols = ARCHITECTURES["mini-llava-next"], Symbols()
    words = architecture.build_model(0).get_input_embeddings().weight
    symbols.start_from_words(words)
    from vtoken.mini.models.base import VOCAB

    assert torch.equal(symbols.tables["color"][0], words[VOCAB["red"]])
    assert torch.equal(symbols.tables["letter"][35], words[VOCAB["##9"]])
