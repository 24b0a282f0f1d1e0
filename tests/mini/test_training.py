# SPDX-License-Identifier: Apache-2.0
"""The training script runs from nothing to a loadable model; its packing is what a lone prompt looks like."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vtoken.mini.loader import check
from vtoken.mini.model import build_model, build_processor
from vtoken.mini.questions import KINDS
from vtoken.mini.training.answering import answer
from vtoken.mini.training.batches import PATCHES, pack, scene_batch, train_rng
from vtoken.mini.training.supervision import Heads, Symbols


def test_all_phases_and_export(tmp_path):
    command = [sys.executable, "-m", "vtoken.mini.training", "all", "--out", str(tmp_path), "--steps", "2"]
    done = subprocess.run([*command, "--threads", "1"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    check(tmp_path / "export")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "export")
    assert model.model.vision_tower.config.num_hidden_layers == 6
    AutoProcessor.from_pretrained(tmp_path / "export")


@pytest.mark.parametrize("kind", KINDS)
def test_packed_answers_equal_a_lone_prompt(kind):
    """Question behind its picture, through the stock model and processor, gives the logits of the packed pass."""
    torch.manual_seed(0)
    model, heads, processor = build_model().eval(), Heads(), build_processor()
    rng = train_rng(11)
    batch = scene_batch(4, rng)
    asked = pack(batch.scenes, 3, [kind, "position"], rng)
    everywhere = torch.arange(PATCHES).expand(4, -1)
    with torch.no_grad():
        features = model.model.get_image_features(pixel_values=batch.pixels, return_dict=True).pooler_output
        found = answer(model, heads, torch.stack(list(features)), everywhere, asked, batch.labels)
        first = (asked.block[0] == 1).nonzero()[:, 0]
        ids = asked.ids[0, first]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "PLACE"}]}],
            add_generation_prompt=False,
        )
        prefix = processor.tokenizer(prompt.split("place")[0].split("PLACE")[0], add_special_tokens=False)["input_ids"]
        assert prefix == [1, 5, 4]
        whole = torch.tensor([[*prefix[:2], *[4] * PATCHES, *ids.tolist()]])
        logits = model(input_ids=whole, pixel_values=batch.pixels[:1]).logits[0]
    target = asked.labels[0, first]
    at = (target != -100).nonzero()[:, 0]
    torch.testing.assert_close(found.logits[: len(at)], logits[2 + PATCHES + at - 1], atol=1e-4, rtol=1e-3)


def test_symbols_start_from_the_words_they_name():
    model, symbols = build_model(), Symbols()
    words = model.get_input_embeddings().weight
    symbols.start_from_words(words)
    from vtoken.mini.model import VOCAB

    assert torch.equal(symbols.tables["color"][0], words[VOCAB["red"]])
