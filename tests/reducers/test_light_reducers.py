# SPDX-License-Identifier: Apache-2.0
"""YOPO and IMA: which layers are light, and which heads a calibration finds active."""

from __future__ import annotations

import pytest
import tiny
import torch
import yaml
from oracles import visual_and_real

import vtoken
from vtoken.cli.describe import describe
from vtoken.engine.light import neighbours
from vtoken.light import LightLayer
from vtoken.reducers.heads import active_heads


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize(("start", "end", "first", "last"), [(0, None, 1, 11), (0.25, 0.75, 4, 8), (2, 7, 3, 6)])
def test_ima_skips_every_nth_layer_between_two(every, start, end, first, last):
    found = vtoken.IMA(every=every, start=start, end=end).light_layers(12)
    assert list(found) == [layer for layer in range(first, last + 1) if layer % every == 0]


def test_ima_skips_what_it_is_told_to():
    skipped = {skip: vtoken.IMA(skip=skip).light_layers(3)[2] for skip in ("ffn", "attention", "block")}
    assert {skip: (light.attention, light.ffn) for skip, light in skipped.items()} == {
        "ffn": (True, 0),
        "attention": (False, 1),
        "block": (False, 0),
    }
    assert vtoken.IMA().stages == ("light",)


def test_yopo_is_light_until_it_drops():
    heads = ((True, False), (True, True), (False, False), (True, True))
    found = vtoken.YOPO(window=7, ffn=0.25, drop_layer=3, heads=heads)
    assert found.layers(4) == (3,)
    assert found.light_layers(4) == {
        0: LightLayer(ffn=0.25, window=7, heads=(True, False)),
        1: LightLayer(ffn=0.25, window=7),
        2: LightLayer(ffn=0.25, window=7, heads=(False, False)),
    }
    assert vtoken.YOPO(window=None, ffn=1, drop_layer=0.5).light_layers(4) == {}
    assert vtoken.YOPO(drop_layer=None).light_layers(3).keys() == {0, 1, 2}
    assert vtoken.YOPO(drop_layer=30).light_layers(3).keys() == {0, 1, 2}


def test_the_catalogue_shows_the_stage():
    assert describe(vtoken.YOPO)[1] == "inside LLM, light layers"
    assert describe(vtoken.IMA)[1] == "light layers"


def test_heads_pass_through_yaml(tmp_path):
    reducer = vtoken.YOPO(heads=[[1, 0], [True, True]])
    written = tmp_path / "mine.yaml"
    plain = {**reducer.config(), "heads": [list(row) for row in reducer.heads]}
    written.write_text(yaml.safe_dump(plain))
    assert vtoken.get_reducer(written) == reducer
    assert reducer.heads == ((True, False), (True, True))


def test_active_heads_by_hand():
    ratios = torch.tensor([0.1, 0.3, 0.2, 0.0]).expand(5, 4, 4).clone()
    ratios[0] += 0.15  # one sample of five
    ratios[1, :, 0] = 0.9  # makes two for head 0
    found = active_heads(ratios, threshold=0.2, majority=0.3, keep_first=1)
    assert found[0] == (True,) * 4
    assert found[1:] == ((True, True, False, False),) * 3
    assert active_heads(ratios, 0.2, majority=0.4, keep_first=0)[3] == (False, True, False, False)


def test_calibration_equals_eager_attentions():
    """Three samples in two batches, against the shares summed up from ``output_attentions``, head by head."""
    model, inputs = tiny.make("llava", (1, 2), attn="eager")
    single = {name: value[:1] for name, value in inputs.items()}
    visual, real = visual_and_real(inputs)
    with torch.no_grad():
        attentions = torch.stack(model(**inputs, output_attentions=True).attentions, 1)
    ratios = torch.zeros(2, 4, 4)
    for row in range(2):
        after = int(visual[row].nonzero().max()) + 1
        rows = attentions[row][:, :, after:]
        ratios[row] = rows[..., visual[row]].sum((2, 3)) / rows[..., real[row] & ~visual[row]].sum((2, 3))
    votes = ratios[[0, 1, 0]]
    threshold = float(votes.median())
    model.set_attn_implementation("sdpa")
    found = vtoken.YOPO.calibrate(model, [inputs, single], threshold, majority=0.5, keep_first=1)
    wanted = (votes > threshold).sum(0) >= 2
    wanted[0] = True
    assert torch.equal(torch.tensor(found), wanted)
    assert not wanted.all()
    with vtoken.reduce(model, "yopo", heads=found), torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


def test_calibration_needs_pictures():
    model, inputs = tiny.make("llava", (1,))
    with pytest.raises(ValueError, match="at least one sample"):
        vtoken.YOPO.calibrate(model, [], 0.1)
    with pytest.raises(ValueError, match="has no picture"):
        vtoken.YOPO.calibrate(model, [{"input_ids": inputs["input_ids"][:, -4:]}], 0.1)


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("ima", {"skip": "all"}, r"skip='all': choose one of \['ffn', 'attention', 'block'\]"),
        ("ima", {"every": 0}, "every=0: give an int of at least 1"),
        ("ima", {"start": -1}, "start=-1 is no decoder layer"),
        ("ima", {"end": 0}, "end=0 is no decoder layer"),
        ("yopo", {"window": 0}, "window=0: give an int of at least 1"),
        ("yopo", {"ffn": 0}, "ffn=0: give a number in"),
        ("yopo", {"drop_layer": 0}, "drop_layer=0 is no decoder layer"),
        ("yopo", {"heads": "all"}, "heads='all': give one list of true and false per decoder layer"),
        ("yopo", {"heads": [[1, 0], [2, 0]]}, r"heads of layer 1 are \[2, 0\]"),
        ("yopo", {"heads": [True]}, "heads of layer 0 are True"),
    ],
)
def test_a_wrong_option_is_a_sentence(name, params, words):
    with pytest.raises(ValueError, match=words):
        vtoken.get_reducer(name, **params)


@pytest.mark.parametrize(("field", "value"), [("ffn", 1.5), ("ffn", -0.1), ("window", 0)])
def test_a_light_layer_checks_its_fields(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        LightLayer(**{field: value})


def test_both_of_two_light_layers():
    one = LightLayer(ffn=0.5, window=5, heads=(True, True, False))
    two = LightLayer(attention=False, window=3, heads=(False, True, True))
    assert one & two == two & one == LightLayer(False, 0.5, 3, (False, True, False))
    assert one & LightLayer() == one


@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_neighbours_by_hand(window):
    """Two views of 3 x 4 cells; an even window is as wide as the odd one below it."""
    cells = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4))
    found = neighbours.neighbours(*(x[None] for x in cells.unbind(1)), window)[0]
    for i, (view, row, column) in enumerate(cells.tolist()):
        for j, (other, y, x) in enumerate(cells.tolist()):
            near = view == other and max(abs(row - y), abs(column - x)) <= (window - 1) // 2
            assert bool(found[i, j]) == near


@pytest.mark.parametrize("block", [1, 3, 7, 50])
@pytest.mark.parametrize("seed", range(4))
def test_bands_hold_every_pair(seed, block):
    generator = torch.Generator().manual_seed(seed)
    at = torch.arange(23)
    near = (at[:, None] - at - seed).abs() <= 2
    pairs = near & (torch.rand(2, 23, 23, generator=generator) < 0.6)
    queries, keys = neighbours.bands(pairs, block)
    assert queries.flatten()[:23].tolist() == at.tolist()
    for number, some in enumerate(queries):
        needed = pairs[:, some[some < 23]].any(0).any(0).nonzero()[:, 0]
        assert set(needed.tolist()) <= set(keys[number].tolist())
        assert keys[number].tolist() == sorted(set(keys[number].tolist()))
        assert 0 <= keys[number].min() <= keys[number].max() < 23
