# SPDX-License-Identifier: Apache-2.0
"""``vtoken.draw``: a pixel is as bright as the token that stays longest of those that show it."""

import numpy as np
import pytest
import tiny
import torch
from oracles import PLANS
from PIL import Image

import vtoken
from vtoken.drawing import BEFORE, INSIDE, LONG_EDGE


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", tiny.CORE)
def test_brightness_tells_what_became_of_a_token(family, plan):
    model, inputs = tiny.make(family, (1, 1))
    images = [Image.new("RGB", (48, 48), (200, 200, 200))] * 2
    with vtoken.reduce(model, PLANS[plan]), torch.no_grad():
        model(**inputs)
        sheet = np.asarray(vtoken.draw(model, inputs, images))
        tokens = vtoken.token_map(model, inputs, [(48, 48)] * 2)
    first, last = tokens.kept[min(tokens.kept)], tokens.kept[max(tokens.kept)]
    levels = [0.0 if bool(b) else INSIDE if bool(a) else BEFORE for a, b in zip(first, last, strict=True)]
    assert max(levels) > 0
    drawn = 0
    for place in range(0, 48, 3):  # every place of the first picture
        covering = [
            level
            for (x0, y0, x1, y1), level, image in zip(tokens.box.tolist(), levels, tokens.image.tolist(), strict=True)
            if image == 0 and x0 + 0.5 < place + 1.5 < x1 - 0.5 and y0 + 0.5 < place + 1.5 < y1 - 0.5
        ]
        if not covering:
            continue  # on an edge
        at = int((place + 1.5) * LONG_EDGE / 48)
        assert sheet[at, at, 0] == pytest.approx(200 * (1 - min(covering)), abs=1)
        drawn += 1
    assert drawn > 3
    assert sheet.shape[1] > 2 * LONG_EDGE


def test_what_cannot_be_drawn_is_said():
    model, inputs = tiny.make("llava", (1,))
    picture = Image.new("RGB", (24, 24))
    with pytest.raises(ValueError, match="wrap the model, run this very prompt"):
        vtoken.draw(model, inputs, picture)
    with vtoken.reduce(model, "random", keep=0.5):
        model(**inputs)
        with pytest.raises(ValueError, match="2 entries for 1 pictures"):
            vtoken.draw(model, inputs, [picture, picture])
        other = {**inputs, "pixel_values": inputs["pixel_values"] + 1}
        with pytest.raises(ValueError, match="run this very prompt"):
            vtoken.draw(model, other, picture)
        assert vtoken.draw(model, inputs, picture).size == (LONG_EDGE, LONG_EDGE)
