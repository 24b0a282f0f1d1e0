# SPDX-License-Identifier: Apache-2.0
"""Every shipped model: intact, small, loadable by name, reducible, and as good as its committed measurement says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import vtoken
import vtoken.mini
from vtoken.mini.documents import TASKS, held_out
from vtoken.mini.models import ARCHITECTURES

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
CLASSES = {
    "mini-llava": "LlavaForConditionalGeneration",
    "mini-llava-next": "LlavaNextForConditionalGeneration",
    "mini-internvl": "InternVLForConditionalGeneration",
    "mini-qwen2.5-vl": "Qwen2_5_VLForConditionalGeneration",
}
OTHERS = [name for name in vtoken.mini.names() if name != "mini-llava"]


def report_of(name):
    return json.loads((RESULTS / f"{name.replace('-', '_').replace('.', '_')}.json").read_text())


def prompt(processor, document, shown=True):
    content = [{"type": "image"}] * len(document.images) if shown else []
    chat = [{"role": "user", "content": [*content, {"type": "text", "text": document.question}]}]
    return processor.apply_chat_template(chat, add_generation_prompt=True)


def answers(model, processor, documents):
    images = [list(document.images) for document in documents]
    texts = [prompt(processor, document) for document in documents]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt", add_special_tokens=False)
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    texts = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def test_every_shipped_model_can_be_trained_anew():
    assert set(vtoken.mini.names()) <= set(ARCHITECTURES)


@pytest.mark.parametrize("name", vtoken.mini.names())
def test_class_and_size(name):
    model, processor = vtoken.mini.load(name)
    assert type(model).__name__ == CLASSES[name]
    assert type(processor) is type(ARCHITECTURES[name].build_processor())
    files = [path.stat().st_size for path in vtoken.mini.folder(name).iterdir()]
    assert sum(files) <= 8 * 2**20


@pytest.mark.parametrize("name", OTHERS)
def test_committed_measurement_belongs_to_the_weights(name):
    report = report_of(name)
    assert report["weights_sha256"] == (vtoken.mini.folder(name) / "sha256").read_text().strip()
    assert set(report["conditions"]["unpruned"]["by_kind"]) >= set(TASKS) - {"video"}


@pytest.mark.parametrize("name", OTHERS)
def test_accuracy_on_held_out_documents(name):
    """A sample of the committed measurement, measured again: within six standard errors."""
    model, processor = vtoken.mini.load(name)
    documents = held_out("attr", 40)
    found = answers(model, processor, documents)
    accuracy = sum(f == d.answer for f, d in zip(found, documents, strict=True)) / len(documents)
    committed = report_of(name)["conditions"]["unpruned"]["by_kind"]["attr"]
    assert abs(accuracy - committed) < 6 * (max(committed * (1 - committed), 0.01) / len(documents)) ** 0.5


@pytest.mark.parametrize("name", OTHERS)
def test_a_reducer_keeps_its_share_and_leaves_no_trace(name):
    model, processor = vtoken.mini.load(name)
    documents = held_out("multi", 2)
    before = answers(model, processor, documents)
    vtoken.wrap(model, "random", keep=0.25)
    answers(model, processor, documents)
    for count in vtoken.stats(model).images:
        assert count.kept == pytest.approx(0.25 * count.tokens, abs=2)
    vtoken.unwrap(model)
    assert answers(model, processor, documents) == before


@pytest.mark.parametrize("name", OTHERS)
def test_weights_are_float16_and_finite(name):
    model, _ = vtoken.mini.load(name, dtype=torch.float16)
    assert all(p.isfinite().all() and p.dtype == torch.float16 for p in model.parameters())


@pytest.mark.parametrize("name", vtoken.mini.names())
def test_a_pipeline_of_transformers(name):
    """It prepares prompts and batches by itself."""
    model, processor = vtoken.mini.load(name)
    documents = held_out("exist", 2)
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": d.images[0]}, {"type": "text", "text": d.question}]}]
        for d in documents
    ]
    with vtoken.reduce(model, "idpruner", keep=0.5):
        ask = transformers.pipeline("image-text-to-text", model=model, processor=processor)
        found = [one[0]["generated_text"][-1]["content"].strip() for one in ask(text=chats, max_new_tokens=8)]
        assert found == answers(model, processor, documents)
        assert vtoken.stats(model).images[0].kept < vtoken.stats(model).images[0].tokens
