# SPDX-License-Identifier: Apache-2.0
"""The shipped model: intact, small, and as good as its committed measurement says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import vtoken
import vtoken.mini
from vtoken.mini.loader import check

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "mini_llava.json"


def test_weights_are_small_and_checked(tmp_path):
    folder = vtoken.mini.folder("mini-llava")
    assert (folder / "model.safetensors").stat().st_size <= 8 * 2**20
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"are damaged .* install vtoken again"):
        check(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="are damaged"):
        check(copy)


def test_unknown_name():
    with pytest.raises(ValueError, match="did you mean 'mini-llava'"):
        vtoken.mini.load("mini-lava")


def test_architecture():
    model, _ = vtoken.mini.load()
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert len(model.model.language_model.layers) >= 6
    assert model.config.vision_config.model_type == "clip_vision_model"


def test_committed_measurement_belongs_to_the_weights_and_the_questions():
    report = json.loads(RESULTS.read_text())
    assert report["weights_sha256"] == (vtoken.mini.folder("mini-llava") / "sha256").read_text().strip()
    assert report["conditions"]["unpruned"]["questions"] == 2000


def test_accuracy_on_held_out_questions():
    """A sample of the committed measurement, measured again: within six standard errors."""
    import io
    import itertools

    from PIL import Image

    from vtoken.eval.tasks.data import load_data

    data = load_data()
    model, processor = vtoken.mini.load()
    sample = list(itertools.islice(data.questions, 160))
    chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q["text"]}]}] for q in sample]
    prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    images = [Image.open(io.BytesIO(data.pictures[q["pictures"][0]])) for q in sample]
    inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt", add_special_tokens=False)
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    texts = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    accuracy = sum(t.strip() == q["answer"] for t, q in zip(texts, sample, strict=True)) / len(sample)
    committed = json.loads(RESULTS.read_text())["conditions"]["unpruned"]["accuracy"]
    assert abs(accuracy - committed) < 6 * (committed * (1 - committed) / len(sample)) ** 0.5 + 1e-9
