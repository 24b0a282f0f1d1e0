# SPDX-License-Identifier: Apache-2.0
"""Models by name, pinned by their weights; damaged files never become random numbers."""

import shutil

import pytest
import safetensors.torch

from vtoken.eval.errors import EvalError
from vtoken.eval.model.loading import ModelSpec, load_model, model_type, weights_id


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def test_a_folder_loads_with_left_padding(checkpoint):
    model, processor = load_model(
        ModelSpec(str(checkpoint), device="cpu", dtype="bfloat16", attn_implementation="eager")
    )
    assert processor.tokenizer.padding_side == "left"
    assert (str(model.dtype), model.config._attn_implementation, model.training) == ("torch.bfloat16", "eager", False)


def test_weights_are_pinned_by_content(copy, checkpoint):
    original = weights_id(ModelSpec(str(checkpoint)))
    assert weights_id(ModelSpec(str(copy))) == original
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert weights_id(ModelSpec(str(copy))) != original


@pytest.mark.parametrize("name", ["mini-lava", "no-such-model", "./nowhere", "/abs/nowhere", "a/b/c"])
def test_unknown_names(name):
    with pytest.raises(EvalError, match=f"Unknown model '{name}'"):
        weights_id(ModelSpec(name))


@pytest.mark.parametrize("damage", ["truncated", "garbage", "gone"])
def test_damaged_weights_are_a_sentence(copy, damage):
    weights = copy / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif damage == "garbage":
        weights.write_bytes(b"not a tensor file" * 100)
    else:
        weights.unlink()
    with pytest.raises(EvalError, match=r"cannot be loaded: .*\.$"):
        load_model(ModelSpec(str(copy), device="cpu"))


def test_missing_tensors_are_not_filled_with_random_numbers(copy):
    weights = copy / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    gone = next(name for name in tensors if "layers.3.mlp" in name)
    del tensors[gone]
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(EvalError, match="incomplete"):
        load_model(ModelSpec(str(copy), device="cpu"))


def test_damaged_config(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(EvalError, match="cannot be read"):
        model_type(ModelSpec(str(copy)))


def test_a_model_without_adapter(copy):
    (copy / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(EvalError, match=r"No adapter knows the model .* of type 'bert': supported are .*llava"):
        model_type(ModelSpec(str(copy)))
