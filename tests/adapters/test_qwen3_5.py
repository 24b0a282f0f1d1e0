# SPDX-License-Identifier: Apache-2.0
"""What the vision tower of Qwen3.5 attends to; its recurrent decoder is tested with those of other types."""

from __future__ import annotations

import pytest
import tiny
import torch
from oracles import Look, eager_weights
from transformers import CONFIG_MAPPING

import vtoken
from vtoken.encoder import EncoderRead

RECEIVED = EncoderRead("received", -1)


@pytest.mark.parametrize("family", [family for family in tiny.HYBRID if family in CONFIG_MAPPING])
def test_encoder_statistics_equal_eager(family):
    """The mean over a token's four patches of what all patches of its picture attend to."""
    model, inputs = tiny.make(family, (1,), attn="eager")
    (weights,) = eager_weights(model.model.visual.blocks[-1].attn, lambda: model(**inputs))
    wanted = weights[0].mean((0, 1)).unflatten(0, (-1, 4)).mean(1)
    model.set_attn_implementation("sdpa")
    look = Look((RECEIVED,))
    with vtoken.reduce(model, look), torch.no_grad():
        model(**inputs)
    assert float(wanted.std()) > 1e-5  # or any map would do
    torch.testing.assert_close(look.seen["ctx"].encoder[RECEIVED][0, : len(wanted)], wanted, atol=1e-6, rtol=1e-4)
