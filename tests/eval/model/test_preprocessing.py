# SPDX-License-Identifier: Apache-2.0
"""``preprocessing="lmms_eval"``: a model gets what the stock lmms-eval wrapper gives it, and answers the same."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import save_checkpoint
from PIL import Image

from vtoken.eval.errors import EvalError
from vtoken.eval.harness.driver import load_harness
from vtoken.eval.model.loaded import LoadedModel
from vtoken.eval.model.loading import ModelSpec
from vtoken.eval.model.preprocessing import STOCK, preprocessing

WRAPPERS = {
    "llava": ("chat.llava_hf", "LlavaHf"),
    "internvl": ("chat.internvl_hf", "InternVLHf"),
    "qwen2_vl": ("simple.qwen2_vl", "Qwen2_VL"),
    "qwen2_5_vl": ("chat.qwen2_5_vl", "Qwen2_5_VL"),
    "qwen3_vl": ("chat.qwen3_vl", "Qwen3_VL"),
}
SIZES = [(96, 64), (400, 300), (64, 200)]  # width, height: below, near and across the wrappers' pixel limits


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    return [
        {"image": Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)), "question": f"what is {i}"}
        for i, (width, height) in enumerate(SIZES)
    ]


@pytest.fixture(scope="module", params=list(WRAPPERS))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoint_of(family, tmp_path_factory):
    return save_checkpoint(family, tmp_path_factory.mktemp(family))


def messages(document):
    image, text = {"type": "image", "url": document["image"]}, {"type": "text", "text": document["question"]}
    return [{"role": "user", "content": [image, text]}]


def asked(documents, simple):
    """Requests as lmms-eval makes them, for a wrapper of its older (simple) or newer (chat) kind."""
    kwargs = {"max_new_tokens": 6, "until": ["a"]}
    if simple:
        return [
            SimpleNamespace(args=(doc["question"], dict(kwargs), lambda d: [d["image"]], i, "task", "test"))
            for i, doc in enumerate(documents)
        ]
    return [SimpleNamespace(args=("", messages, dict(kwargs), i, "task", "test")) for i, _ in enumerate(documents)]


def run(model, inner, requests, documents, monkeypatch):
    """Answers, and what ``generate`` was given for each, by the prompt's length and its pixels."""
    model.task_dict["task"] = {"test": documents}
    given, original = [], inner.generate
    with monkeypatch.context() as patch:
        patch.setattr(inner, "generate", lambda **call: given.append(call) or original(**call))
        found = model.generate_until(requests)
    return [getattr(answer, "text", answer) for answer in found], given


@pytest.fixture
def stock(family, checkpoint_of):
    load_harness()
    module, name = WRAPPERS[family]
    wrapper = getattr(importlib.import_module(f"lmms_eval.models.{module}"), name)
    return wrapper(pretrained=str(checkpoint_of), device="cpu", device_map="cpu", batch_size=1)


@pytest.fixture
def ours(checkpoint_of):
    load_harness()
    from vtoken.eval.model.reduced import ReducedModel

    return ReducedModel(LoadedModel(ModelSpec(str(checkpoint_of), device="cpu", preprocessing="lmms_eval")))


def test_inputs_and_answers_are_those_of_the_stock_wrapper(family, stock, ours, documents, monkeypatch):
    requests = asked(documents, WRAPPERS[family][0].startswith("simple"))
    wanted, theirs = run(stock, stock.model, requests, documents, monkeypatch)
    answers, given = run(ours, ours.loaded.model, asked(documents, False), documents, monkeypatch)
    assert answers == wanted
    assert len(set(answers)) > 1
    order = sorted(range(3), key=lambda i: theirs[i]["input_ids"].tolist())
    for ours_at, theirs_at in zip(sorted(range(3), key=lambda i: given[i]["input_ids"].tolist()), order, strict=True):
        for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw"):
            if name in theirs[theirs_at]:
                assert torch.equal(given[ours_at][name], theirs[theirs_at][name].to(given[ours_at][name].dtype)), name
    assert ours.loaded.model.dtype == stock.model.dtype


def test_the_checkpoints_own_preprocessing_differs(family, checkpoint_of, ours, documents, monkeypatch):
    """The test above can fail: for every family but LLaVA the two presets are not the same."""
    from vtoken.eval.model.reduced import ReducedModel

    plain = ReducedModel(LoadedModel(ModelSpec(str(checkpoint_of), device="cpu")))
    _, own = run(plain, plain.loaded.model, asked(documents, False), documents, monkeypatch)
    _, stock = run(ours, ours.loaded.model, asked(documents, False), documents, monkeypatch)
    same = all(
        a["input_ids"].shape == b["input_ids"].shape and torch.equal(a["pixel_values"], b["pixel_values"])
        for a, b in zip(own, stock, strict=True)
    )
    assert same == (family == "llava")


def test_unknown_presets_and_families_are_sentences():
    with pytest.raises(EvalError, match="Unknown preprocessing 'lmms-eval': did you mean 'lmms_eval'"):
        ModelSpec("mini-llava", preprocessing="lmms-eval")
    with pytest.raises(EvalError, match=r"not known for models of type 'gemma3'.*internvl.*use preprocessing='checkp"):
        preprocessing("lmms_eval", "gemma3")


def test_clips_that_cannot_be_reproduced_are_refused():
    talk = [{"role": "user", "content": [{"type": "video", "video": "clip.mp4"}, {"type": "text", "text": "what"}]}]
    with pytest.raises(EvalError, match="does not reproduce how lmms-eval samples clips"):
        STOCK["qwen2_vl"].encode(None, [talk])
