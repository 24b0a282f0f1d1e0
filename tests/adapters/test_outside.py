# SPDX-License-Identifier: Apache-2.0
"""Models that are no ``ForConditionalGeneration``: without a head, retrieval, classifiers, code of other packages."""

from __future__ import annotations

import warnings

import foreign
import pytest
import tiny
import torch
import transformers as tf
import zoo
from oracles import PLANS, TOLERANCE
from torch.nn.utils.rnn import pad_sequence

import vtoken

every_plan = pytest.mark.parametrize("plan", PLANS)
ATTENTIVE = ("aim", "dyvte", "explain", "fastv", "pyramiddrop", "sparsevlm", "todre", "yopo")
"""Reducers that read, or change, attention at layers which are recurrent in the tiny models."""
CONVENTION = ("deepseek_vl", "gemma4", "glm4v", "lfm2_vl", "qwen3_omni_moe_thinker")


def reduced(model, inputs, plan, backend="drop"):
    """The output of a wrapped model, from which tokens were dropped."""
    with vtoken.reduce(model, PLANS[plan], backend=backend), torch.no_grad():
        out = model(**inputs)
        assert vtoken.stats(model).tokens_per_layer < vtoken.stats(model).tokens_in
    return out


@every_plan
@pytest.mark.parametrize("family", tiny.CORE)
def test_models_without_a_head(family, plan):
    model, inputs = tiny.make(family, (1, 2))
    dropped = reduced(model.model, inputs, plan).last_hidden_state[:, -1:]
    whole = reduced(model, inputs, plan).logits[:, -1:]
    torch.testing.assert_close(model.lm_head(dropped), whole, **TOLERANCE)


@pytest.mark.parametrize("family", [family for family in CONVENTION if family in tf.CONFIG_MAPPING])
def test_models_without_a_head_by_convention(family):
    case = zoo.make(family, (1, 2))
    dropped = reduced(case.model.model, case.inputs, "before").last_hidden_state[:, -1:]
    logits = case.model.lm_head(dropped)
    if (cap := getattr(case.model.config.get_text_config(), "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    torch.testing.assert_close(logits, reduced(case.model, case.inputs, "before").logits[:, -1:], **TOLERANCE)


@every_plan
def test_a_retriever_that_tells_its_pictures(plan):
    vlm, inputs = tiny.make("paligemma", (1, 2))
    torch.manual_seed(0)
    model = tf.ColPaliForRetrieval(tf.ColPaliConfig(vlm_config=vlm.config.to_dict())).eval()
    dropped, hidden = (reduced(model, inputs, plan, backend).embeddings for backend in ("drop", "mask"))
    torch.testing.assert_close(dropped[:, -1], hidden[:, -1], **TOLERANCE)
    whole = model(**inputs).embeddings
    assert (dropped - whole).abs().max() > 100 * TOLERANCE["atol"]
    with vtoken.reduce(model, "random", keep=1.0):
        assert torch.equal(model(**inputs).embeddings, whole)


def test_a_type_that_no_test_runs_is_announced_once():
    vlm, _ = tiny.make("paligemma", (1,))
    model = tf.ColPaliForRetrieval(tf.ColPaliConfig(vlm_config=vlm.config.to_dict())).eval()
    with pytest.warns(UserWarning, match="'colpali'.* no test runs this type: vtoken doctor") as told:
        vtoken.wrap(model, "random", keep=0.5)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vtoken.wrap(vlm, "random", keep=0.5)


@pytest.mark.parametrize("name", ["Blip2", "InstructBlip"])
def test_a_q_former_before_an_encoder_decoder_is_refused(name):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": tiny.VOCAB}
    former = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    parts = {
        "text_config": {"model_type": "t5", **sizes},
        "vision_config": tiny.vision_config(),
        "qformer_config": {**former, "encoder_hidden_size": 32, "vocab_size": tiny.VOCAB},
    }
    model = getattr(tf, f"{name}ForConditionalGeneration")(getattr(tf, f"{name}Config")(**parts, num_query_tokens=6))
    with pytest.raises(TypeError, match=f"language model of this {name}.* is an encoder-decoder model"):
        vtoken.wrap(model, "random", keep=0.5)


def test_a_retriever_that_merges_pictures_itself_is_refused_and_its_inner_model_is_served():
    """Dropping nothing without a word would be the worst answer."""
    vlm, inputs = tiny.make("qwen2_vl", (1, 1))
    model = tf.ColQwen2ForRetrieval(tf.ColQwen2Config(vlm_config=vlm.config.to_dict())).eval()
    pictures = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(1).tolist())
    padded = {**inputs, "pixel_values": pad_sequence(pictures, batch_first=True)}  # as ColQwen2's processor does
    whole = model(**padded).embeddings[:, -1]
    with vtoken.reduce(model, "random", keep=0.5):
        with pytest.raises(NotImplementedError, match=r"merges them into the prompt itself.*wrap its Qwen2VLModel and"):
            model(**padded)
        text = {"input_ids": inputs["input_ids"][:1, :3], "attention_mask": inputs["attention_mask"][:1, :3]}
        assert model(**text).embeddings.isfinite().all()
    assert torch.equal(model(**padded).embeddings[:, -1], whole)
    states = reduced(model.vlm, inputs, "before").last_hidden_state
    assert states.shape[:2] == inputs["input_ids"].shape


@every_plan
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gemma3", "Gemma3ForSequenceClassification"),
        ("qwen3_5", "Qwen3_5ForSequenceClassification"),
        ("qwen3_5", "Qwen3_5ForTokenClassification"),
    ],
)
def test_classifiers(family, name, plan):
    """Their head sees the states of a wrapped model without one."""
    if not hasattr(tf, name):
        pytest.skip(f"transformers {tf.__version__} has no {name}")
    vlm, inputs = tiny.make(family, (1, 2))
    vlm.config.get_text_config().pad_token_id = tiny.PAD
    torch.manual_seed(0)
    model = getattr(tf, name)(vlm.config).eval()
    states = reduced(model.model, inputs, plan).last_hidden_state[:, -1]
    found = reduced(model, inputs, plan).logits
    torch.testing.assert_close(found if found.dim() == 2 else found[:, -1], model.score(states), **TOLERANCE)


@pytest.mark.parametrize("make", [foreign.MiniCPMVStandIn, foreign.KimiVLStandIn, foreign.MolmoStandIn])
def test_other_chat_models_are_refused_by_name(make):
    model = make()
    with pytest.raises(
        TypeError, match=f"^{make.__name__} has no get_image_features .*docs/adding-a-family.md"
    ) as info:
        vtoken.wrap(model, "random", keep=0.5)
    assert str(info.value).count(". ") == 0
    assert not [name for name, part in model.named_modules() if part._forward_pre_hooks or part._forward_hooks]


@pytest.mark.parametrize("name", [*vtoken.list_reducers()])
@pytest.mark.parametrize("family", [family for family in ("qwen3_5", "qwen3_5_moe") if family in tf.CONFIG_MAPPING])
def test_every_reducer_runs_on_recurrent_decoders_or_is_refused_when_it_is_wrapped(family, name):
    model, inputs = tiny.make(family, (1,))
    params = {"keep": 0.5} if "keep" in vtoken.get_reducer(name).config() else {}
    if name in ATTENTIVE:
        with pytest.raises(NotImplementedError, match=r"recurrent|not defined"):
            vtoken.wrap(model, name, **params)
        return
    vtoken.wrap(model, name, **params)
    if name in ("globalcom2", "tower-prune"):
        with pytest.raises(ValueError, match="vision tower"):  # what it does not have
            model(**inputs)
    else:
        assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("family", ["idefics3", "smolvlm", "llava"])
def test_a_window_that_the_model_ignores_changes_nothing(family):
    """A layer's window is what its module does, not what a field of the configuration says."""
    model, inputs = tiny.make(family, (1, 2))
    whole, dropped = model(**inputs).logits, reduced(model, inputs, "inside").logits
    model.config.get_text_config().sliding_window = 8
    assert torch.equal(model(**inputs).logits, whole)
    torch.testing.assert_close(reduced(model, inputs, "inside").logits, dropped)
